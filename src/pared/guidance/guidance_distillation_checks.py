"""What must hold of guidance distillation without trained weights: its paper's mathematics.

Run by `pared check guidance-distillation`.
"""

import copy

import torch
from torch import Tensor

from pared import anatomy
from pared.anatomy import presets
from pared.guidance.guidance_distillation import INFO, GuidanceDistillation
from pared.method import convert
from pared.nn.diffusion import Level, ddim_step, guided, one_of_two, renoised
from pared.objectives.denoising import Denoising
from pared.objectives.guided import WEIGHT
from pared.objectives.paths import Path

PATHS = [Path.of(Denoising(prediction)) for prediction in ("flow", "v", "noise")]
WEIGHTS = torch.tensor([0.0, 0.7, 14.0])


def _student(family: str):
    """A converted toy, its anatomy, and a call of three samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = presets.build(f"toy:{family}", device="cpu")
        student = convert(copy.deepcopy(teacher), GuidanceDistillation())
    seed = torch.Generator().manual_seed(1)
    example = anatomy.of(teacher).example(3, 8, 8, text_tokens=8, generator=seed)
    return teacher, student, example


@torch.no_grad()
def check_start() -> None:
    """Fresh from the conversion the student is its teacher for every w, bit for bit."""
    for family in INFO.families:
        teacher, student, (latents, timestep, condition) = _student(family)
        wanted = anatomy.of(teacher).denoise(teacher, latents, timestep, condition)
        with_w = condition | {WEIGHT: WEIGHTS}
        for given in (condition, with_w):
            found = anatomy.of(student).denoise(student, latents, timestep, given)
            assert torch.equal(found, wanted), f"{family}: the student differs from its teacher"


@torch.no_grad()
def check_each_sample_has_its_weight() -> None:
    """Once the new weights have moved, w counts, and for its own sample alone."""
    for family in INFO.families:
        teacher, student, (latents, timestep, condition) = _student(family)
        old = dict(teacher.named_parameters())
        for name, parameter in student.named_parameters():
            if name not in old:
                parameter.add_(0.05)
        denoise = anatomy.of(student).denoise
        plain = denoise(student, latents, timestep, condition)
        found = denoise(student, latents, timestep, condition | {WEIGHT: WEIGHTS})
        # Beside equal inputs, batches of one size round alike.
        assert torch.equal(found[0], plain[0]), f"{family}: no weight isn't a weight of 0"
        moved = (found - plain).abs().amax(dim=(1, 2, 3))
        assert (moved[1:] > 1e-5).all(), f"{family}: w changes nothing"


def check_guided_target() -> None:
    """At w = 0 the target is the conditional teacher; in w it is linear, of slope x_c - x_u."""
    conditional, unconditional = torch.randn(2, 3, 4, 8, 8, generator=_generator()).double()
    zero = guided(conditional, unconditional, torch.zeros(3))
    assert torch.equal(zero, conditional), "w = 0 must leave the conditional estimate"
    w1, w2 = torch.tensor([0.5, 3.0, 14.0]), torch.tensor([2.0, 0.0, 7.5])
    found = guided(conditional, unconditional, w1) - guided(conditional, unconditional, w2)
    slope = (w1 - w2).double().view(-1, 1, 1, 1)
    wanted = slope * (conditional - unconditional)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def check_two_steps_in_one() -> None:
    """One step with x~ goes where two steps go: 1e-5 relative, in float64 1e-10, to t = 0 too."""
    for path in PATHS:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            for steps in (1, 2, 8, 100):
                _assert_two_in_one(path, dtype, tolerance, steps)


def _assert_two_in_one(path: Path, dtype: torch.dtype, tolerance: float, steps: int) -> None:
    i = torch.arange(1, steps + 1, dtype=torch.float64)
    t, middle, end = (path.level(x / (2 * steps)) for x in (2 * i, 2 * i - 1, 2 * i - 2))
    assert end.sigma[0] == 0, "the last step must end where there is no noise at all"
    z, first, second = torch.randn(3, steps, 50, generator=_generator()).to(dtype)
    twice = ddim_step(ddim_step(z, first, t, middle), second, middle, end)
    x = one_of_two(first, second, t, middle, end)
    error = (ddim_step(z, x, t, end) - twice).norm(dim=1) / twice.norm(dim=1)
    assert error.max() <= tolerance, f"{steps} steps: off by {error.max():.1e}"
    assert torch.equal(x[0], second[0]), "into t = 0 the target is the second estimate"
    constant = one_of_two(first, first, t, middle, end)
    assert torch.equal(constant, first), "of two equal estimates the target is just that"


def check_renoising() -> None:
    """Fresh noise takes N(0, alpha_k^2 s^2 + sigma_k^2) to N(0, alpha_s^2 s^2 + sigma_s^2)."""
    times = torch.tensor([[0.0, 0.25], [0.25, 0.5], [0.5, 1.0]], dtype=torch.float64)
    for path in PATHS:
        for k, s in times:
            before, after = path.level(k), path.level(s)
            _assert_renoised(before, after)
            z = _std(before) * torch.randn(200_000, generator=_generator()).double()
            noise = torch.randn(200_000, generator=_generator(1)).double()
            found = renoised(z, noise, before, after).var()
            # The variance of 200,000 normal numbers is known to 0.3%.
            torch.testing.assert_close(found, _std(after) ** 2, rtol=0.02, atol=0)


def _assert_renoised(before: Level, after: Level) -> None:
    """The same by algebra: the two factors, read off from ones."""
    one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    kept = renoised(one, nothing, before, after)
    added = renoised(nothing, one, before, after)
    variance = (kept * _std(before)) ** 2 + added**2
    torch.testing.assert_close(variance[0], _std(after) ** 2, rtol=1e-12, atol=0)


def _std(level: Level, s: float = 1.7) -> Tensor:
    return (level.alpha**2 * s**2 + level.sigma**2).sqrt()


def check_parameters() -> None:
    """New are 256 x width weights of a U-Net, else those of one MLP (256 -> D -> D)."""
    sizes = {"unet": 256 * 32, "pixart": 256 * 32 + 32 + 32 * 32 + 32}
    sizes |= {"sd3": sizes["pixart"], "dit": sizes["pixart"]}
    for family, wanted in sizes.items():
        teacher, student, _ = _student(family)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (teacher, student))
        assert after - before == wanted, f"{family}: {after - before} new, not {wanted}"


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
