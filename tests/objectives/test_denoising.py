"""The paths from data to noise, and what is predicted on them."""

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.objectives.denoising import (
    Denoising,
    clean_latents,
    flow_path,
    variance_preserving_path,
)


def test_flow_runs_straight_from_data_to_noise():
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    start, velocity = flow_path(x0, noise, torch.zeros(2))
    end, _ = flow_path(x0, noise, torch.ones(2))
    assert torch.equal(start, x0)
    assert torch.equal(end, noise)
    torch.testing.assert_close(start + velocity, end)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_variance_preserving_targets_are_those_of_diffusers(prediction):
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
    )
    objective = Denoising({"epsilon": "noise", "v_prediction": "v"}[prediction])
    torch.testing.assert_close(objective.alpha_bars, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    x0, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    latents, target = variance_preserving_path(
        x0, noise, objective.alpha_bars[t], objective.prediction
    )
    torch.testing.assert_close(latents, scheduler.add_noise(x0, noise, t), rtol=1e-3, atol=1e-4)
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(target, wanted, rtol=1e-3, atol=1e-4)


def test_a_perfect_flow_leads_the_stock_solver_to_the_data():
    """The sign, scale and clock of the flow objective are those of the pipelines' scheduler."""
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(10)
    x0, x = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for t in scheduler.timesteps:
        s = t / 1000
        # On a straight path towards x0 the velocity is (x - x0) / s wherever one stands.
        x = scheduler.step((x - x0) / s, t, x).prev_sample
    assert (x - x0).abs().max() < 0.05


def test_everything_random_comes_from_the_generator():
    objective = Denoising("flow", "logit_normal")
    batch = {"latents": torch.randn(4, 4, 8, 8), "latent_std": torch.full((4, 4, 8, 8), 0.1)}
    draws = [objective.noised(batch, torch.Generator().manual_seed(5)) for _ in range(2)]
    torch.manual_seed(99)
    assert torch.equal(draws[0].latents, draws[1].latents)
    assert torch.equal(draws[0].timestep, draws[1].timestep)
    other = objective.noised(batch, torch.Generator().manual_seed(6))
    assert not torch.equal(draws[0].latents, other.latents)


@pytest.mark.parametrize(
    "settings", [("flow",), ("flow", "logit_normal"), ("noise",), ("v",)], ids=" ".join
)
def test_times_are_distributed_as_promised(settings):
    """By the largest gap between the shares below each time, drawn and promised (Kolmogorov)."""
    latents = torch.zeros(4000, 1, 1, 1)
    noised = Denoising(*settings).noised({"latents": latents}, torch.Generator().manual_seed(0))
    times = noised.timestep.double().sort().values
    promised = times / 1000
    if "logit_normal" in settings:
        promised = torch.special.ndtr(promised.logit())
    drawn = (torch.arange(4000).double() + 0.5) / 4000
    # 1.63 / sqrt(4000) = 0.026 is exceeded once in a hundred times.
    assert (promised - drawn).abs().max() < 0.026
    if settings[0] != "flow":
        assert set(times.tolist()) <= set(range(1000))


def test_latents_are_drawn_from_the_posterior():
    mean = torch.tensor([-3.0, 0.0, 5.0, 1.0]).view(1, 4, 1, 1).expand(2, 4, 50, 50)
    std = torch.tensor([0.0, 0.1, 1.0, 2.0]).view(1, 4, 1, 1).expand(2, 4, 50, 50)
    seeded = torch.Generator().manual_seed(0)
    drawn = clean_latents({"latents": mean, "latent_std": std}, seeded)
    # Of 5000 numbers each: 2 / sqrt(5000) = 0.03 is one deviation of the last mean.
    torch.testing.assert_close(drawn.mean(dim=(0, 2, 3)), mean[0, :, 0, 0], rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.std(dim=(0, 2, 3)), std[0, :, 0, 0], rtol=0.05, atol=0)
    assert torch.equal(clean_latents({"latents": mean}, seeded), mean)


@pytest.mark.parametrize(
    "settings, told",
    [
        (("epsilon",), "prediction 'epsilon' doesn't exist; give noise or v or flow"),
        (("flow", "normal"), "time_sampling 'normal' doesn't exist; give uniform or logit_normal"),
        (("v", "logit_normal"), "is for flows, and this denoiser predicts 'v'; leave it out"),
    ],
)
def test_tasks_that_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        Denoising(*settings)


def test_loss_of_a_silent_model_is_the_power_of_the_target():
    model = presets.build("toy:pixart", device="cpu")
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    latents, _, condition = anatomy.of(model).example(batch=64)
    batch = {"latents": torch.zeros_like(latents), **condition}
    loss = Denoising("flow")(model, batch, torch.Generator().manual_seed(0))["task"]
    assert float(loss.detach()) == pytest.approx(1.0, abs=0.05)  # the target is the noise itself
