"""Levels, times and predictions of a path are those of diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler

from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.nn.diffusion import noised
from pared.objectives.denoising import Denoising
from pared.objectives.paths import Path

KINDS = ("flow", "v", "noise")


def path(kind: str) -> Path:
    return Path.of(Denoising(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_the_path_is_exactly_clean(kind):
    alpha, sigma = path(kind).level(torch.zeros(2, dtype=torch.float64))
    assert torch.equal(alpha, torch.ones_like(alpha))
    assert torch.equal(sigma, torch.zeros_like(sigma))


@pytest.mark.parametrize("kind", ["v", "noise"])
@pytest.mark.parametrize("steps", [4, 8, 50])
def test_times_and_levels_are_those_of_a_trailing_scheduler(kind, steps):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    t = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    assert torch.equal(path(kind).timestep(t), scheduler.timesteps)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps].double()
    torch.testing.assert_close(path(kind).level(t).alpha ** 2, alpha_bar, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_times_come_back_from_what_the_denoiser_is_told(kind):
    t = torch.tensor([0.001, 0.25, 0.999, 1.0], dtype=torch.float64)
    along = path(kind)
    again = along.time(along.timestep(t))
    torch.testing.assert_close(again.double(), t, rtol=1e-6, atol=0)
    torch.testing.assert_close(along.level(again).sigma.double(), along.level(t).sigma)


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_prediction_gives_the_data_back(kind):
    x, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    along = path(kind)
    level = along.level(torch.tensor([0.001, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64))
    z = noised(x, noise, level)
    alpha, sigma = (a.view(-1, 1, 1, 1) for a in level)
    right = {"flow": noise - x, "v": alpha * noise - sigma * x, "noise": noise}[kind]
    torch.testing.assert_close(along.clean(right, z, level), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(along.predicted(x, z, level), right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["velocity", "truncated_snr"])
def test_errors_of_predictions_weigh_as_those_of_clean_estimates(kind, weighting):
    t = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    along = path(kind)
    level = along.level(t)
    z, got, wanted = torch.randn(3, 3, 2, 4, 4, dtype=torch.float64)
    error = along.clean(got, z, level) - along.clean(wanted, z, level)
    snr = (level.alpha / level.sigma) ** 2
    if weighting == "truncated_snr":
        omega = snr.clamp(min=1)
    else:  # a flow's error is its clean estimate's over sigma
        omega = level.sigma**-2 if kind == "flow" else snr + 1
    expected = (omega.view(-1, 1, 1, 1) * error**2).mean()
    torch.testing.assert_close(along.error(got, wanted, level, weighting), expected)


@pytest.mark.parametrize("kind", ["v", "noise"])
def test_no_more_times_than_the_grid_has(kind):
    path(kind).require(1000)
    with pytest.raises(InputError, match="1002 different times don't fit into the 1000"):
        path(kind).require(1002)
    path("flow").require(1002)


@torch.no_grad()
def test_an_estimate_calls_the_denoiser_as_its_family_does():
    model = presets.build("toy:unet", device="cpu")
    latents, _, condition = anatomy.of(model).example(2, 8, 8, text_tokens=4)
    along = path("v")
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    prediction = anatomy.of(model).denoise(model, latents, torch.tensor([249, 999]), condition)
    wanted = along.clean(prediction, latents, along.level(t))
    assert torch.equal(along.estimate(model, condition)(latents, t), wanted)
