"""The toy models of the contract, and how they're called."""

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import presets
from pared.method import Handle, RuntimeMethod
from pared.method import apply as _apply

# Of a run, unless it says otherwise.
STEPS = 8

# A batched matrix product adds up in another order than a single one.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}

Example = tuple[Tensor, Tensor, dict[str, Tensor]]  # latents, timestep, condition


def toy_families() -> list[str]:
    """The families that have a toy, by name."""
    names = {family.name for family in anatomy.families().values()}
    return sorted(name for name in names if f"toy:{name}" in presets.names())


def toy(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The toy of a family, its weights the same every time."""
    # One draw for all types, cast by torch's own `to`: that of diffusers warns of nothing.
    return nn.Module.to(presets.build(f"toy:{family}", device="cpu"), dtype)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def example(model: nn.Module, **size: int) -> Example:
    """Fixed inputs of one call, of the smaller of the family's two sizes unless told otherwise."""
    family = anatomy.of(model)
    return family.example(**(family.sizes[0] | size), generator=generator())


def output(model: nn.Module, **size: int) -> Tensor:
    """The output of one call on fixed inputs; with its graph where weights want gradients."""
    return anatomy.of(model).run(model, *example(model, **size))


def require_close(found: Tensor, wanted: Tensor) -> None:
    """Refuse what bfloat16 gave where it isn't finite, or far from float32."""
    assert found.isfinite().all(), "the output isn't finite"
    error = float((found.detach().float() - wanted).norm() / wanted.norm())
    # Eight bits of mantissa through a few layers: some percent; a wrong path is off by far more.
    assert error < 0.1, f"the output is {error:.0%} away from that in float32"


# Runs ---------------------------------------------------------------------------------------------


def apply(model: nn.Module, *methods: RuntimeMethod) -> Handle:
    """`pared.apply`, with the number of steps told to methods that must know: no toy tells it."""
    told = (
        m.model_copy(update={"steps": STEPS}) if getattr(m, "steps", STEPS) is None else m
        for m in methods
    )
    return _apply(model, *told)


def sampled(
    model: nn.Module,
    given: Example | None = None,
    steps: int = STEPS,
    ends: int | None = None,
    **size: int,
) -> Tensor:
    """What a model predicts at each step of a run, (steps, batch, ...).

    Args:
        model: a denoiser.
        given: inputs of the first step; by default those of `example`.
        steps: of the run.
        ends: the step from which the first sample of the batch goes on alone, and is all that is
            returned.
        size: of the example.
    """
    latents, timestep, condition = example(model, **size) if given is None else given
    dtype, latents, found = latents.dtype, latents.float(), []
    for number, time in enumerate(_times(steps)):
        if number == ends:
            latents, condition = latents[:1], {name: x[:1] for name, x in condition.items()}
        now = torch.full_like(timestep[: len(latents)], time)
        found.append(_predicted(model, latents.to(dtype), now, condition).float())
        latents = latents - 0.1 * found[-1]
    return torch.stack([each[: len(latents)] for each in found])


def guided(model: nn.Module, joint: bool, ends: int | None = None) -> Tensor:
    """What a model predicts with guidance at each step of a run, (steps, 1, ...).

    Args:
        model: a denoiser.
        joint: on a joint batch; otherwise by calls in turn.
        ends: the step from which there is no guidance any more.
    """
    latents, timestep, condition = example(model, batch=2)
    without, prompt = (
        {name: x[i : i + 1].clone() for name, x in condition.items()} for i in (0, 1)
    )
    latents, found = latents[:1], []
    for number, time in enumerate(_times(STEPS)):
        now = torch.full_like(timestep, time)
        if ends is not None and number >= ends:
            found.append(_predicted(model, latents, now[:1], prompt))
        else:
            if joint:
                twice = torch.cat([latents, latents])
                pair = _predicted(model, twice, now, condition).chunk(2)
            else:
                pair = tuple(_predicted(model, latents, now[:1], c) for c in (without, prompt))
            found.append(pair[0] + 2 * (pair[1] - pair[0]))
        latents = latents - 0.1 * found[-1]
    return torch.stack(found)


def _times(steps: int) -> list[int]:
    return [round(950 - number * 900 / steps) for number in range(steps)]


def _predicted(
    model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
) -> Tensor:
    return anatomy.of(model).denoise(model, latents, timestep, condition)
