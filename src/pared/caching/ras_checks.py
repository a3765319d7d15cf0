"""What must hold of region-adaptive sampling without trained weights: its paper's mathematics.

Run by `pared check ras`.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pared import anatomy
from pared.anatomy import presets
from pared.anatomy.denoiser import Denoiser
from pared.caching.ras import INFO, RAS
from pared.caching.regional import Regions
from pared.caching.regions import active_count, active_set, patch_metric
from pared.method import apply

# So often was a patch skipped that it must come next, whatever it is like.
OFTEN = 1e6
# Side of a patch in latent pixels, in all toys.
SIDE = 2
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def check_off() -> None:
    """With all patches active, or no step but dense ones, a run is the model's own, bit for bit."""
    for name in INFO.families:
        model = _toy(name)
        wanted = torch.stack(_run(model, _latents(model, 5)))
        for settings in (RAS(ratio=1), RAS(start=5, steps=5)):
            with apply(model, settings) as handle:
                found = torch.stack(_run(model, _latents(model, 5)))
            assert torch.equal(found, wanted), f"{name}: {settings.spec()} changed the output"
            assert handle.stats["ras"]["bytes"] == 0, "something was kept"


def check_all_active() -> None:
    """Where all patches are chosen, gathering and scattering them leaves the dense prediction."""
    for name in INFO.families:
        model = _toy(name)
        wanted = _run(model, _latents(model, 4))
        with apply(model, RAS(start=1, quantum=1000)) as handle:
            found = _run(model, _latents(model, 4))
        stats = handle.stats["ras"]
        assert stats["active_patches"] == stats["patches"] > 0, stats
        torch.testing.assert_close(found, wanted, **ROUNDING)


def check_kept_keys() -> None:
    """On the inputs of the dense step the active patches, whichever, get what they had there."""
    for name in INFO.families:
        model = _toy(name)
        latents = _latents(model, 1) * 6
        with apply(model, RAS(start=1, ratio=0.25)) as handle:
            hook = model.register_forward_pre_hook(SameTime(), with_kwargs=True)
            outputs = _run(model, latents, {step: _some(step, 64, 16) for step in range(6)})
            hook.remove()
        assert handle.stats["ras"]["active_patches"] == 5 * 16, handle.stats
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], **ROUNDING)


def check_inactive_patches() -> None:
    """Inactive patches keep their last prediction; the active ones don't see what they are now."""
    first, second = _some(1, 64, 32), _some(2, 64, 32)
    for name in INFO.families:
        model = _toy(name)
        latents, runs = _latents(model, 4), []
        others = _mask(second).logical_not()
        for change in (0.0, 1.0):
            last = _patches(latents[3]) + change * others[..., None]
            given = [*latents[:3], _pixels(last, latents[3])]
            with apply(model, RAS(start=2)):
                runs.append(_run(model, given, {2: first, 3: second}))
        _, before, between, after = (_patches(output) for output in runs[0])
        assert torch.equal(_patches(runs[1][3]), after), f"{name}: active patches saw the others"
        now, then = _mask(second), _mask(first) & ~_mask(second)
        assert torch.equal(after[then], between[then]), f"{name}: an older prediction was used"
        never = ~now & ~then
        assert never.any() and torch.equal(after[never], before[never])
        assert not torch.isclose(after[now], before[now]).all(dim=-1).any()


def check_cost() -> None:
    """Work on patches is that of the active ones; scores are (a n + text) x (n + text)."""
    for name, text in (("sd3", 8), ("pixart", 0)):
        model = _toy(name)
        with apply(model, RAS(start=1, ratio=0.25)):
            dense, regional = _flops(model)
        block = f"{type(model).__name__}.transformer_blocks.1"
        attn = f"{block}.{'attn' if text else 'attn1'}"
        tokens, active, width = 64, 16, 32
        assert regional[f"{block}.ff"] * tokens == dense[f"{block}.ff"] * active
        for patches, found in ((tokens, dense[attn]), (active, regional[attn])):
            projections = 2 * 4 * (patches + text) * width**2
            scores = 2 * 2 * (patches + text) * (tokens + text) * width
            assert found == projections + scores, (name, patches, found)
        if text:
            assert regional[f"{block}.ff_context"] == dense[f"{block}.ff_context"]


def check_selection() -> None:
    """Of a known map the patches of low spread are active, as many as the ratio says."""
    spread = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 8.0, 7.0]])
    signs = torch.tensor([1.0, -1.0])
    update = (spread[:, :, None] * signs)[..., None] * torch.ones(4)  # (1, 8, 2 channels, 4 pixels)
    torch.testing.assert_close(patch_metric(update, "std"), spread)
    torch.testing.assert_close(patch_metric(update, "norm"), spread * math.sqrt(2))
    fresh = torch.zeros(1, 8)
    for high, wanted in ((1.0, [0, 1, 2, 3, 4]), (0.0, [0, 2, 5, 6, 7]), (0.34, [0, 2, 4, 5, 7])):
        assert active_set(spread, fresh, 5, high).tolist() == [wanted], f"high_ratio={high}"
    assert [active_count(8, r) for r in (1, 0.5, 0.3, 0.01)] == [8, 4, 3, 1]
    assert [active_count(256, 0.5, more, 64) for more in (0, 1, -1, 500)] == [128, 128, 192, 64]
    # A patch of three times the spread comes in once it was skipped more than ln 3 times as often.
    skips = torch.zeros(1, 8)
    skips[0, 5] = 2
    assert active_set(spread, skips, 3, k=1.0).tolist() == [[1, 3, 5]]
    assert active_set(spread, skips, 3, k=0.1).tolist() == [[1, 3, 4]]
    assert active_set(spread, skips, 5, k=1.0, upstream_compat=True).tolist() == [[0, 1, 2, 3, 4]]


def check_starvation() -> None:
    """Every patch is active within (1 + ln(max / min of m) / k) / ratio steps; at k = 0 few are."""
    m = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) + 0.2
    reach = float((m.amax(dim=1) / m.amin(dim=1)).log().max())
    for ratio in (0.5, 0.25):
        for k in (0.5, 1.0, 4.0):
            steps = math.ceil((1 + reach / k) / ratio)
            seen = _seen(m, steps, ratio, k=k)
            assert seen.all(), f"ratio={ratio}, k={k}: {(~seen).sum()} patches starve"
            assert _seen(m, steps, ratio, k=k, high_ratio=0.5).all(), "the low ones starve"
        count = active_count(64, ratio)
        assert (_seen(m, 40, ratio, k=0.0).sum(dim=1) == count).all(), "k=0 chose others"
        assert (_seen(m, 40, ratio, upstream_compat=True).sum(dim=1) == count).all()


def check_patches() -> None:
    """A patch's number is that of its token, also where pictures and patches have other shapes."""
    for name in INFO.families:
        for side in (2,) if name == "flux" else (2, 4):
            model = _toy(name, side)
            family = cast(Denoiser, anatomy.of(model))
            width = 12 if name == "dit" else 20  # its pictures are squares
            rows, columns = 12 // side, width // side
            tokens: list[Tensor] = []
            embedder = model.get_submodule(family.embedder)
            latents = torch.zeros(1, family.channels, 12, width)
            hook = embedder.register_forward_hook(_written(tokens, family))
            for number in (0, 1, columns, rows * columns - 2):
                row, column = divmod(number, columns)
                changed = latents.clone()
                changed[..., row * side, column * side + 1] = 1
                tokens.clear()
                _call(model, latents), _call(model, changed)
                (embedded, was), (others, now) = tokens[:2], tokens[2:]
                differ = (embedded != others).any(dim=-1)
                assert differ.nonzero().tolist() == [[0, number]], f"{name}: another token"
                differ = (was != now).flatten(2).any(dim=-1)
                assert differ.nonzero().tolist() == [[0, number]], f"{name}: another patch"
            hook.remove()


def check_steps() -> None:
    """T = 28: dense at 0-3, 12 and 20, filled ahead of the others; the last one keeps nothing."""
    settings = RAS(resets=(12, 20), steps=28)
    dense = [step for step in range(28) if settings.dense(step, 28)]
    assert dense == [0, 1, 2, 3, 12, 20], dense
    assert settings.dense(28, 28) and not settings.dense(28) and RAS(end=9).dense(9)
    model, modes = _toy("sd3"), list[str]()
    with apply(model, settings):
        regions = _regions(model)
        hook = model.register_forward_hook(lambda *_: modes.append(regions.plan.mode))
        _run(model, _latents(model, 1) * 28)
        hook.remove()
        assert not regions.clock.kept, "something was kept behind the last step"
    filled = {3: "fill", 12: "fill", 20: "fill"}
    plain = ["full"] * 3 + ["regional"] * 25
    assert modes == [filled.get(step, mode) for step, mode in enumerate(plain)], modes


def check_ramp() -> None:
    """More and more patches are skipped, and on average as many as without a ramp."""
    settings = RAS(ramp=256, quantum=64)
    steps = [step for step in range(30) if not settings.dense(step, 30)]
    counts = [active_count(4096, 0.5, settings.more(step, 30), 64) for step in steps]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 7, counts
    assert all(count % 64 == 0 for count in counts)
    # To the next multiple of 64.
    assert 2048 <= sum(counts) / len(counts) < 2048 + 64, counts
    levels = [settings.more(step, 30) for step in steps]
    assert abs(sum(levels)) <= len(levels) / 2 and levels[0] - levels[-1] == -6 * 256, levels


# Helpers ------------------------------------------------------------------------------------------


class SameTime:
    """A hook by which the model sees the time of the first call, whatever the clock saw."""

    def __init__(self) -> None:
        self.time: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        self.time = kwargs["timestep"] if self.time is None else self.time
        return args, kwargs | {"timestep": self.time}


@torch.no_grad()
def _toy(name: str, side: int = SIDE) -> nn.Module:
    """A toy whose weights are stirred: gates that start at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    model = presets.build(f"toy:{name}", device="cpu")
    if side != SIDE:
        model = type(model)(**presets.get(f"toy:{name}").main.config | {"patch_size": side}).eval()
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def _latents(model: nn.Module, steps: int) -> list[Tensor]:
    """Of a batch of two in 64 patches, others at each step."""
    generator = torch.Generator().manual_seed(0)
    family = cast(Denoiser, anatomy.of(model))
    return [torch.randn(2, family.channels, 16, 16, generator=generator) for _ in range(steps)]


@torch.no_grad()
def _call(model: nn.Module, latents: Tensor, time: float = 500) -> Tensor:
    family = cast(Denoiser, anatomy.of(model))
    generator = torch.Generator().manual_seed(1)
    size = {"height": 8, "width": 8, "text_tokens": 8}
    _, timestep, condition = family.example(len(latents), **size, generator=generator)
    return family.denoise(model, latents, torch.full_like(timestep, time), condition)


def _run(
    model: nn.Module, latents: list[Tensor], chosen: dict[int, Tensor] | None = None
) -> list[Tensor]:
    """Predictions of the steps of one run; at some, the active patches are these."""
    outputs = []
    for step, now in enumerate(latents):
        if chosen and step in chosen:
            _choose(model, chosen[step])
        outputs.append(_call(model, now, 990 - 30 * step))
    return outputs


def _regions(model: nn.Module) -> Regions:
    """What is attached to a model."""
    family = cast(Denoiser, anatomy.of(model))
    return cast(Any, model.get_submodule(family.embedder)).forward.around.__self__


def _choose(model: nn.Module, patches: Tensor) -> None:
    """Have these patches, (batch, active), chosen at the coming step, if it is a regional one."""
    kept = _regions(model).clock.kept
    if kept:
        kept["skips"] = torch.zeros_like(kept["skips"]).scatter(1, patches, OFTEN)


def _some(seed: int, patches: int, count: int) -> Tensor:
    """Random numbers of patches for a batch of two, (2, count)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(patches, generator=generator)[:count] for _ in range(2)])


def _mask(patches: Tensor) -> Tensor:
    """(2, 64), True at these patches."""
    return torch.zeros(2, 64, dtype=torch.bool).scatter(1, patches, True)


def _patches(latents: Tensor) -> Tensor:
    """(batch, patches, what is in them)."""
    return F.pixel_unshuffle(latents, SIDE).flatten(2).mT


def _pixels(patches: Tensor, like: Tensor) -> Tensor:
    height, width = (side // SIDE for side in like.shape[-2:])
    return F.pixel_shuffle(patches.mT.unflatten(2, (height, width)), SIDE)


def _seen(m: Tensor, steps: int, ratio: float, **how: Any) -> Tensor:
    """Which patches were active at all in so many steps of the same metric, (batch, patches)."""
    skips, count = torch.zeros_like(m), active_count(m.shape[1], ratio)
    for _ in range(steps):
        active = active_set(m, skips, count, **how)
        skips = (skips + 1).scatter(1, active, skips.gather(1, active))
    return skips < steps


def _written(into: list[Tensor], family: Denoiser) -> Any:
    """A hook that writes down an embedding's tokens and the patches that it was given."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        into.append(output[0] if isinstance(output, tuple) else output)
        into.append(family.patches(args[0]))

    return hook


def _flops(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of every module at a dense step and at the regional one behind it, for one sample."""
    found = []
    for step, now in enumerate(_latents(model, 2)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _call(model, now[:1], 990 - 30 * step)
        counts = counter.get_flop_counts()
        found.append({name: sum(of_module.values()) for name, of_module in counts.items()})
    return found[0], found[1]
