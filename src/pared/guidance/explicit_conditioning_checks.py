"""What must hold of explicit conditioning without trained weights: its paper's mathematics.

Run by `pared check explicit-conditioning`.
"""

import copy
import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import presets
from pared.guidance.explicit_conditioning import ExplicitConditioning
from pared.guidance.sampling import prepared, scheduler_with
from pared.method import convert
from pared.objectives.denoising import Denoising, Prediction, variance_preserving_path
from pared.objectives.endpoint import (
    Gaussian,
    fuse,
    pooled,
    prior_of,
    score,
    standard,
    transport_cost,
)
from pared.objectives.explicit import Explicit, zero_terminal_snr

SHAPE = (2, 4, 16, 16)
# Stable Diffusion's schedule.
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Every scheduler that can do it, deterministic and not.
SCHEDULERS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("DDIMScheduler", {"clip_sample": False}, {}),
    ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.5}),
    ("DDPMScheduler", {"clip_sample": False}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("EulerDiscreteScheduler", {}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
)
FLOWS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("FlowMatchEulerDiscreteScheduler", {}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        {},
    ),
    (
        "DPMSolverMultistepScheduler",
        {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "algorithm_type": "sde-dpmsolver++",
        },
        {},
    ),
)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def schedulers() -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Schedulers with what their models predict and what their steps are called with."""
    for prediction in ("epsilon", "v_prediction"):
        for name, config, call in SCHEDULERS:
            cls = getattr(diffusers, name)
            yield cls(**SD, prediction_type=prediction, **config), prediction, call
    for name, config, call in FLOWS:
        yield getattr(diffusers, name)(**config), "flow_prediction", call


def ready(preset: str = "toy:unet", **settings: Any) -> nn.Module:
    """A converted toy whose prior tells prompts apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = convert(
            presets.build(preset, device="cpu"), ExplicitConditioning(**settings)
        )
        nn.init.normal_(prior_of(model).prompt.head.weight, std=0.1)
    return model.eval()


def walked(scheduler: Any, predict: Any, y: Tensor, steps: int, **call: Any) -> Tensor:
    """What a scheduler gives after all its steps from y; `predict` is told latents and time."""
    scheduler.set_timesteps(steps)
    z = y * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        z = stepped(scheduler, predict(scaled(scheduler, z, t), t), t, z, **call)
    return z


def scaled(scheduler: Any, z: Tensor, t: Tensor) -> Tensor:
    """What the denoiser is given of a sample."""
    return scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z


def stepped(scheduler: Any, told: Tensor, t: Tensor, z: Tensor, **call: Any) -> Tensor:
    """The next sample; what is random depends on the time alone."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        call["generator"] = seeded(int(t) + 2)
    return scheduler.step(told, t, z, **call, return_dict=False)[0]


def check_off_switch() -> None:
    """With mu = 0, Sigma = 1 noised latents and loss are bit by bit those of plain diffusion."""
    model = presets.build("toy:unet", device="cpu")
    family = anatomy.of(model)
    latents, _, condition = family.example(batch=2, generator=seeded())
    zeros = torch.zeros_like(latents)
    batch = {"latents": latents, "latent_std": 0.1 * torch.ones_like(latents), **condition}
    given = batch | {"source": zeros, "source_std": zeros}
    # As converted, the prompt's part is N(0, 1) for every prompt.
    converted = convert(copy.deepcopy(model), ExplicitConditioning())
    for prediction in ("noise", "v", "flow"):
        plain = Denoising(prediction)
        explicit = Explicit(Denoising(prediction))
        if prediction == "v":
            plain.alpha_bars = zero_terminal_snr(plain.alpha_bars)
        wanted = plain.noised(batch, seeded(1))
        found = explicit.noised(batch, standard(latents), seeded(1))
        assert torch.equal(found.latents, wanted.latents), f"{prediction}: other latents"
        assert torch.equal(found.target, wanted.target), f"{prediction}: another target"
        losses = plain(model, batch, seeded(1)), explicit(converted, given, seeded(1))
        assert torch.equal(losses[0]["task"], losses[1]["task"]), f"{prediction}: another loss"


def check_off_switch_of_schedulers() -> None:
    """With mu = 0, Sigma = 1 every scheduler takes its own steps, bit by bit."""
    model = presets.build("toy:unet", device="cpu")
    family = anatomy.of(model)
    latents, _, condition = family.example(generator=seeded())

    def predict(z: Tensor, t: Any) -> Tensor:
        return family.denoise(model, z, torch.as_tensor(t).expand(len(z)), condition)

    with torch.no_grad():
        for scheduler, prediction, call in schedulers():
            own, plain = scheduler_with(scheduler, standard(latents)), prepared(scheduler)
            found, wanted = (walked(s, predict, latents, 3, **call) for s in (own, plain))
            what = f"{type(own).__name__} with {prediction}, {call}"
            assert wanted.isfinite().all(), what
            assert torch.equal(found, wanted), f"{what} takes other steps"


def check_moments() -> None:
    """Mean and variance of z_t are alpha x + sigma mu and sigma^2 Sigma, over 100,000 draws."""
    count, generator = 100_000, seeded()
    x, mu = torch.randn(2, 8, generator=generator)
    std = torch.rand(8, generator=generator) + 0.1
    endpoint = Gaussian(mu.expand(count, -1), std.expand(count, -1))
    alpha_bar = torch.full((count,), 0.4)
    y = endpoint.draw(generator)
    z, _ = variance_preserving_path(x.expand(count, -1), y, alpha_bar, "v")
    alpha, sigma = 0.4**0.5, 0.6**0.5
    # Three standard errors of a mean, and of a variance of normal numbers.
    error = 3 * sigma * std / count**0.5
    assert ((z.mean(0) - alpha * x - sigma * mu).abs() < error).all(), "the mean is off"
    wanted = (sigma * std).square()
    assert ((z.var(0) / wanted - 1).abs() < 3 * (2 / count) ** 0.5).all(), "the variance is off"


def check_score() -> None:
    """The gradient of log N(z_t; alpha x + sigma mu, sigma^2 Sigma) is -eps / (std sigma): 1e-5."""
    generator = seeded()
    x, mu, eps = torch.randn(3, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
    std = torch.rand(1, 4, 8, 8, generator=generator, dtype=torch.float64) + 0.1
    alpha, sigma = 0.8, 0.6
    z = (alpha * x + sigma * (mu + std * eps)).requires_grad_(True)
    density = torch.distributions.Normal(alpha * x + sigma * mu, sigma * std).log_prob(z).sum()
    (gradient,) = torch.autograd.grad(density, z)
    torch.testing.assert_close(gradient, -eps / std / sigma, rtol=1e-5, atol=1e-5)
    found = score(z.detach(), x, alpha, sigma, Gaussian(mu, std))
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5)


def check_oracle() -> None:
    """Told the true v, DDIM comes to x from y in any number of steps: 1e-5.

    On Stable Diffusion's own schedule, which keeps a trace of x at its end, it doesn't.
    """
    x, y = torch.randn(2, *SHAPE, generator=seeded())
    own = Denoising("v").alpha_bars
    for steps in (1, 2, 3, 7, 20, 50):
        error = (ddim(x, y, zero_terminal_snr(own), steps, "v") - x).abs().max()
        assert error < 1e-5, f"{steps} steps end {error:.1e} away from x"
        for prediction in ("noise", "v"):
            error = (ddim(x, y, own, steps, prediction) - x).abs().max()
            assert error > 5e-3, f"{prediction}: the trace of x at t = T should show"


def ddim(x: Tensor, y: Tensor, bars: Tensor, steps: int, prediction: Prediction) -> Tensor:
    """DDIM from z_T = y down to the data, with the true prediction at every time."""
    times = torch.linspace(len(bars) - 1, 0, steps + 1).round().long()
    levels = [*bars[times[:-1]].tolist(), 1.0]
    z = y
    for now, then in pairwise(levels):
        alpha, sigma = now**0.5, (1 - now) ** 0.5
        bar = torch.full((len(x),), now)
        _, told = variance_preserving_path(x, y, bar, prediction)
        if prediction == "v":
            x_hat, y_hat = alpha * z - sigma * told, sigma * z + alpha * told
        else:
            x_hat, y_hat = (z - sigma * told) / alpha, told
        z = then**0.5 * x_hat + (1 - then) ** 0.5 * y_hat
    return z


def check_fusion() -> None:
    """With nothing of the prompt "sum" is the picture's Gaussian; "rms" keeps a unit variance."""
    mu, var = torch.randn(2, 3, generator=seeded()), torch.rand(2, 3, generator=seeded(1))
    nothing, one = torch.zeros_like(mu), torch.ones_like(mu)
    found = fuse(mu, var, nothing, nothing, "sum")
    assert torch.equal(found[0], mu) and torch.equal(found[1], var), "the sum changed the picture's"
    other = torch.randn(2, 3, generator=seeded(2))
    for mode, mean, variance in (
        ("sum", mu + other, 2 * one),
        ("rms", (mu + other) / 2**0.5, one),
        ("mean", (mu + other) / 2, one),
    ):
        found = fuse(mu, one, other, one, mode)
        torch.testing.assert_close(found[0], mean)
        torch.testing.assert_close(found[1], variance)


def check_transport() -> None:
    """Mean ||x - y||^2 is ||x - mu||^2 + tr Sigma, less than for white noise where x is near."""
    generator = seeded()
    context = torch.randn(64, 4, 8, 8, generator=generator)
    x = context + 0.3 * torch.randn(context.shape, generator=generator)
    near = Gaussian(context, torch.full_like(context, 0.5))
    costs = {}
    for name, endpoint in (("near", near), ("white", standard(x))):
        draws = [(x - endpoint.draw(generator)).square().flatten(1).sum(1) for _ in range(50)]
        costs[name] = torch.stack(draws).mean()
        torch.testing.assert_close(
            costs[name], transport_cost(x, endpoint).mean(), rtol=1e-2, atol=0
        )
    assert costs["near"] < 0.5 * costs["white"], f"the way isn't shorter: {costs}"


def check_stochastic_steps() -> None:
    """Every scheduler's step keeps z_t at N(alpha_t x + sigma_t mu, sigma_t^2 Sigma).

    Shown where the model knows x, after two of four steps; most of these steps add noise.
    """
    count, generator = 40_000, seeded()
    x, mu = torch.randn(2, 4, generator=generator)
    std = torch.rand(4, generator=generator) + 0.2
    x, mu, std = (each.expand(count, 4) for each in (x, mu, std))
    endpoint = Gaussian(mu, std)
    for scheduler, prediction, call in schedulers():
        own = scheduler_with(scheduler, endpoint)
        own.set_timesteps(4)
        z = on_path(own, own.timesteps[0], x, endpoint.draw(seeded(1)))
        for t in own.timesteps[:2]:
            alpha, sigma = parts(own, t)
            y = (z - alpha * x) / sigma
            told = {"epsilon": y, "flow_prediction": y - x}.get(prediction)
            if told is None:
                # In the scaling of the model, alpha^2 + sigma^2 = 1.
                size = (alpha**2 + sigma**2) ** 0.5
                told = (alpha * y - sigma * x) / size
            scaled(own, z, t)
            z = stepped(own, told, t, z, **call)
        alpha, sigma = parts(own, own.timesteps[2])
        what = f"{type(own).__name__} with {prediction}, {call}"
        error = (z.mean(0) - (alpha * x + sigma * mu)[0]).abs() / (sigma * std[0] / count**0.5)
        assert error.max() < 4.5, f"{what}: the mean is {error.max():.1f} standard errors off"
        ratio = z.var(0) / (sigma * std[0]).square()
        assert ((ratio - 1).abs() < 0.05).all(), f"{what}: the variance is {ratio} of what it was"


def parts(scheduler: Any, t: Any) -> tuple[Tensor, Tensor]:
    """The shares of x and y in a sample at a time, by the scheduler's own noising."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    return on_path(scheduler, t, one, zero), on_path(scheduler, t, zero, one)


def on_path(scheduler: Any, t: Any, x: Tensor, y: Tensor) -> Tensor:
    """The sample between x and y at a time, by the scheduler's own noising."""
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(4)
    if hasattr(fresh, "scale_noise"):
        return fresh.scale_noise(x, t.reshape(1), y)
    return fresh.add_noise(x, y, t.reshape(1))


def check_diversity() -> None:
    """Samples of one pass differ with the seed where Sigma > 0, and the more the larger it is."""
    model = ready()
    family, prior = anatomy.of(model), prior_of(model)
    assert prior is not None
    latents, _, condition = family.example(generator=seeded())
    spreads = []
    with torch.no_grad():
        endpoint = prior(latents, torch.zeros_like(latents), condition)
        for scale in (0.0, 0.1, 0.3, 1.0, 3.0):
            scaled_by = Gaussian(endpoint.mean, scale * endpoint.std)
            y = torch.cat([scaled_by.draw(seeded(seed)) for seed in range(16)])
            given = {name: entry.expand(16, *entry.shape[1:]) for name, entry in condition.items()}
            # One Euler step along the flow.
            x = y - family.denoise(model, y, torch.full((16,), 1000.0), given)
            spreads.append(float(x.var(0).mean()))
    assert spreads[0] < 1e-10, "without variance samples differ"
    assert spreads == sorted(spreads), f"the spread of samples isn't monotone: {spreads}"


def check_text_route() -> None:
    """Exchanged prompts change mu by exactly what their maps differ in, under "sum"."""
    for preset in ("toy:unet", "toy:pixart", "toy:sd3"):
        model = ready(preset)
        prior = prior_of(model)
        assert prior is not None
        latents, _, condition = anatomy.of(model).example(batch=2, generator=seeded())
        swapped = {name: entry.flip(0) for name, entry in condition.items()}
        mu = torch.zeros_like(latents)
        with torch.no_grad():
            one, other = (prior(mu, mu, each) for each in (condition, swapped))
            maps = prior.of_prompt(condition, (latents.shape[-2], latents.shape[-1]))[0]
        assert not torch.equal(pooled(condition), pooled(swapped)), f"{preset}: prompts are alike"
        assert (maps - maps.flip(0)).abs().max() > 0.01, f"{preset}: maps are alike"
        assert torch.equal(other.mean - one.mean, maps.flip(0) - maps), f"{preset}: mu differs"
