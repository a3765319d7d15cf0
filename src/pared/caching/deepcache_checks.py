"""What must hold of DeepCache without trained weights: its paper's mathematics.

Run by `pared check deepcache`.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import presets
from pared.anatomy.unet import Cut, UNet
from pared.caching.deepcache import DeepCache, quadratic_steps, released_steps
from pared.method import apply

TOYS = ("toy:unet", "toy:sdxl")


class Reference:
    """The slow form: all of the U-Net runs at every step.

    At the steps between, what enters from below is replaced by what entered at the last full step.
    A forward pre-hook of the layer where it enters.
    """

    def __init__(self, cut: Cut, full: Collection[int]) -> None:
        self.cut, self.full, self.step = cut, full, 0

    def __call__(self, entry: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        joined, *rest = args
        if self.step in self.full:
            self.below = joined[:, : self.cut.channels].clone()
        self.step += 1
        return torch.cat([self.below, joined[:, self.cut.channels :]], dim=1), *rest


@contextmanager
def reference(model: nn.Module, branch: int, full: Collection[int]) -> Iterator[None]:
    """A run of a model by `Reference`, with these full steps."""
    cut = _unet(model).cut(branch)
    hook = cut.entry.register_forward_pre_hook(Reference(cut, full))
    try:
        yield
    finally:
        hook.remove()


def check_reference() -> None:
    """Leaving out what lies below changes no bit: at every branch it's the slow form's output."""
    for name in TOYS:
        model = presets.build(name, device="cpu")
        plain = _run(model)
        for branch in range(len(_unet(model).skips)):
            with reference(model, branch, {0, 3}):
                wanted = _run(model)
            with apply(model, DeepCache(interval=3, branch=branch)):
                found = _run(model)
            assert torch.equal(found, wanted), f"branch {branch} of {name} isn't the slow form"
            assert not torch.equal(found[1], plain[1]), f"branch {branch} of {name} reuses nothing"


def check_every_step_full() -> None:
    """With N = 1 every output is the model's own, bit for bit."""
    for name in TOYS:
        model = presets.build(name, device="cpu")
        wanted = _run(model)
        with apply(model, DeepCache(interval=1)):
            assert torch.equal(_run(model), wanted), f"{name} isn't the same"


def check_deepest() -> None:
    """At the deepest branch only the middle is left out: if it's always the same, so is the run."""
    for name in TOYS:
        model = cast(Any, presets.build(name, device="cpu"))
        model.mid_block = Constant()
        wanted = _run(model)
        for interval in (2, 100):
            method = DeepCache(interval=interval, branch=len(_unet(model).skips) - 1)
            with apply(model, method):
                assert torch.equal(_run(model), wanted), f"N = {interval} on {name} isn't the same"


class Constant(nn.Module):
    """A middle that says the same at every step."""

    def forward(self, hidden_states: Tensor, *args: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


@torch.no_grad()
def check_same_latents() -> None:
    """On a full step's own inputs a step between gives its output, whatever the deep weights are.

    The last layer's weights do make a difference.
    """
    for branch in range(4):
        model = cast(Any, presets.build("toy:unet", device="cpu"))
        family = _unet(model)
        latents, timestep, condition = _example(family)
        call = partial(family.denoise, model, latents)
        # Falling, as the timesteps of a run do, but the same to the model, which has float32.
        times = [timestep.double() - 1e-6 * number for number in range(4)]
        with apply(model, DeepCache(interval=9, branch=branch)):
            full = call(times[0], condition)
            assert torch.equal(call(times[1], condition), full), (
                f"branch {branch} differs from the full step"
            )
            for idle in family.cut(branch).idle:
                for weight in idle.module.parameters():
                    weight.add_(1)
            assert torch.equal(call(times[2], condition), full), (
                f"branch {branch} runs what lies below"
            )
            model.up_blocks[-1].resnets[-1].conv1.weight.add_(0.1)
            assert not torch.equal(call(times[3], condition), full), (
                f"branch {branch} runs no last layer"
            )


def check_calls() -> None:
    """The layers that run at a step between are those down to the branch and up from it, once."""
    model = presets.build("toy:unet", device="cpu")
    family = _unet(model)
    layers = {p: m for p, m in model.named_modules() if not [*m.children()] and [*m.parameters()]}
    for branch, skip in enumerate(family.skips):
        ends = [path for above in family.skips[: branch + 1] for path in (*above.down, *above.up)]
        levels = {path.partition(".resnets")[0] for path in (*ends, *skip.up) if "up_" in path}
        ends += [f"{level}.upsamplers" for level in levels]
        wanted = {
            path
            for path in layers
            if not path.startswith(("down_", "mid_", "up_"))
            or path.startswith(tuple(f"{end}." for end in ends))
        }
        calls = list[Counter[str]]()
        hooks = [model.register_forward_pre_hook(lambda *_, c=calls: c.append(Counter()))]
        for path, layer in layers.items():

            def called(*_: Any, path: str = path, calls: list[Counter[str]] = calls) -> None:
                calls[-1][path] += 1

            hooks.append(layer.register_forward_pre_hook(called))
        with apply(model, DeepCache(interval=2, branch=branch)):
            _run(model, 2)
        for hook in hooks:
            hook.remove()
        assert calls[0] == Counter(layers.keys()), "a full step doesn't run every layer once"
        assert calls[1] == Counter(wanted), f"branch {branch} runs {sorted(calls[1])}"


def check_memory() -> None:
    """One tensor is kept: as wide as what is below the branch, as large as the branch's level."""
    model = presets.build("toy:unet", device="cpu")
    for branch, (width, side) in enumerate(((32, 8), (64, 8), (64, 4), (64, 4))):
        with apply(model, DeepCache(branch=branch)) as handle:
            _run(model)
        kept = handle.stats["deepcache"]["bytes"]
        assert kept == 2 * width * side * side * 4, f"{kept} bytes are kept at branch {branch}"


def check_schedules() -> None:
    """T = 50, N = 5: every fifth step; 10 around step 15; and those of the released code."""
    assert _steps(DeepCache(interval=5), 50) == [*range(0, 50, 5)]
    quadratic = DeepCache(interval=5, schedule="quadratic")
    assert _steps(quadratic, 50) == [0, 6, 11, 14, 15, 19, 24, 29, 35, 42]
    assert released_steps(50) == (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)
    listed = DeepCache(schedule=(0, 4, 6), warmup=2, final=3)
    assert _steps(listed, 10) == [0, 1, 4, 6, 7, 8, 9]
    for steps in (4, 7, 20, 33, 50, 100):
        for interval in (1, 2, 3, 5, 10):
            for schedule in (quadratic_steps, released_steps):
                found = schedule(steps, interval, 15, 1.4)
                assert len({*found}) == -(-steps // interval), f"{found} of {steps} / {interval}"
                assert found[0] == 0 and [*found] == sorted(found) and found[-1] < steps


def _steps(method: DeepCache, steps: int) -> list[int]:
    return [step for step in range(steps) if method.full(step, steps)]


def _unet(model: nn.Module) -> UNet:
    return cast(UNet, anatomy.of(model))


def _example(family: UNet) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return family.example(batch=2, height=8, width=8, text_tokens=5, generator=generator)


@torch.no_grad()
def _run(model: nn.Module, steps: int = 6) -> Tensor:
    """The outputs at a few steps from fixed noise, (steps, batch, channels, height, width)."""
    family, outputs = _unet(model), list[Tensor]()
    latents, timestep, condition = _example(family)
    for step in range(steps):
        time = torch.full_like(timestep, 900 - 100 * step)
        outputs.append(family.denoise(model, latents, time, condition))
        latents = latents - 0.1 * outputs[-1]
    return torch.stack(outputs)
