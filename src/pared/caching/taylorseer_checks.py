"""What must hold of TaylorSeer without trained weights: its paper's mathematics.

Run by `pared check taylorseer`.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pared import anatomy
from pared.anatomy import presets
from pared.caching.taylorseer import INFO, TaylorSeer
from pared.method import apply
from pared.nn.forecast import Forecaster, History, Predictor

SITES: tuple[Literal["module", "block", "output"], ...] = ("module", "block", "output")


def _toy(family: str) -> nn.Module:
    return presets.build(f"toy:{family}", device="cpu")


def check_off() -> None:
    """With N = 1, or a warm-up as long as the run, every step is the model's own, bit for bit."""
    for name in INFO.families:
        model = _toy(name)
        wanted = _run(model, 4)
        for sites in SITES:
            for settings in (TaylorSeer(interval=1, sites=sites), TaylorSeer(warmup=4)):
                with apply(model, settings) as handle:
                    assert torch.equal(_run(model, 4), wanted), f"{name}, {sites}: it differs"
                assert "forecast" not in handle.stats["taylorseer"], "something was forecast"


def check_reuse() -> None:
    """Order 0 equals plain reuse of module outputs, written down by itself, bit for bit."""
    for name in INFO.families:
        model = _toy(name)
        settings = TaylorSeer(interval=3, warmup=2, order=0)
        with apply(model, settings):
            found = _run(model, 9)
        assert torch.equal(found, _reusing(model, settings, 9)), f"{name}: it isn't plain reuse"


def _reusing(model: nn.Module, settings: TaylorSeer, steps: int) -> Tensor:
    """A run in which hooks give back each branch's output of the last full step."""
    kept: dict[str, Any] = {}
    step = -1

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    def hook(path: str) -> Any:
        def reuse(module: nn.Module, args: Any, output: Any) -> Any:
            if settings.full(step):
                kept[path] = output
            return kept[path]

        return reuse

    hooks = [model.register_forward_pre_hook(count)]
    hooks += [b.module.register_forward_hook(hook(b.path)) for b in anatomy.of(model).branches]
    try:
        return _run(model, steps)
    finally:
        for each in hooks:
            each.remove()


def check_polynomials() -> None:
    """Lines are forecast exactly, and for y = a s^2 order 2 is off by -a N k.

    For y = (s / 50)^2 with W = 3 and N = 4 behind step 20 at most 0.114, 0.0084, 0.0048 and 0.0048
    with orders 0 to 3. Newton's series is exact up to its order, on uneven gaps too.
    """
    for order in (1, 2, 3):
        assert _worst(lambda s: 3 * s - 7, order) < 1e-12, f"a line at order {order}"
        for degree in range(order + 1):
            error = _worst(lambda s, p=degree: (s / 50) ** p, order, "newton")
            assert error < 1e-12, f"degree {degree} by Newton at order {order}: {error:.1e}"
    for order, wanted in enumerate((0.114, 0.0084, 0.0048, 0.0048)):
        found = _worst(lambda s: (s / 50) ** 2, order, after=20)
        assert abs(found - wanted) < 0.01 * wanted, f"order {order}: {found:.5f}, not {wanted}"
    for step, error in _errors(lambda s: 2 * s**2, 2, "taylor"):
        k = (step - 2) % 4
        assert step <= 10 or abs(error + 2 * 4 * k) < 1e-9, f"{error} at step {step}"


def _worst(value: Any, order: int, predictor: Predictor = "taylor", after: int = 10) -> float:
    """The largest error of a run of 50 steps behind a step, as soon as all factors are there."""
    return max(abs(e) for step, e in _errors(value, order, predictor) if step > after + 4 * order)


def _errors(value: Any, order: int, predictor: Predictor) -> list[tuple[int, float]]:
    """Forecast minus value at each forecast step, W = 3 and N = 4."""
    settings, seer = TaylorSeer(order=order), Forecaster(order, predictor)
    history: History | None = None
    errors = []
    for step in range(50):
        right = torch.tensor(float(value(step)), dtype=torch.float64)
        if settings.full(step):
            history = seer.updated(history, step, (right,))
        elif history is not None:
            (found,) = seer.forecast(history, step)
            errors.append((step, float(found - right)))
    return errors


def check_schedule() -> None:
    """T = 50: W = 3 and N = 3 to 7 make 18, 14, 12, 10 and 9 full steps, W = 2 and N = 5 11."""
    counted = [sum(map(TaylorSeer(interval=n).full, range(50))) for n in (3, 4, 5, 6, 7)]
    assert counted == [18, 14, 12, 10, 9], counted
    for full, published in zip(counted, (2.77, 3.57, None, 4.99, 5.54), strict=True):
        assert published is None or abs(50 / full - published) < 0.02, f"{50 / full:.2f}"
    assert sum(map(TaylorSeer(warmup=2, interval=5).full, range(50))) == 11
    assert [s for s in range(15) if TaylorSeer().full(s)] == [0, 1, 2, 6, 10, 14]


def check_memory() -> None:
    """Behind the i-th full step each site has min(i, m + 1) factors, and the bytes are counted."""
    for order in (0, 1, 2):
        model = _toy("pixart")
        with apply(model, TaylorSeer(interval=2, warmup=2, order=order)) as handle:
            clock = _seer(model).clock
            for full, steps in ((1, 1), (2, 2), (2, 3), (3, 4), (3, 5), (4, 6)):
                _run(model, steps)
                counts = {len(known.history.factors[0]) for known in clock.kept.values()}
                assert counts == {min(full, order + 1)}, f"{counts} factors at {full} full steps"
        # Two blocks of three branches; 2 samples, 16 tokens of 32 channels in float32.
        wanted = 6 * (order + 1) * 2 * 16 * 32 * 4
        assert handle.stats["taylorseer"]["bytes"] == wanted, handle.stats


def check_skipped_steps() -> None:
    """A forecast step computes no attention and no layer within a branch, and all other layers."""
    for name in INFO.families:
        model = _toy(name)
        family = anatomy.of(model)
        inside = [path for branch in family.branches for path in (branch.path, *branch.feeds)]
        with apply(model, TaylorSeer(warmup=1, interval=2)):
            full, forecast = _layers(model, (900, 800))
        assert full.attentions and not forecast.attentions, f"{name}: attention was computed"
        left = {p for p in full.paths if any(f"{p}.".startswith(f"{i}.") for i in inside)}
        assert left and forecast.paths == full.paths - left, (
            f"{name}: {sorted(forecast.paths ^ (full.paths - left))} ran when they shouldn't, or "
            "didn't when they should"
        )


def check_lite() -> None:
    """Forecasting the output alone runs no layer, and equals forecasting the last projection."""
    for name in INFO.families:
        model = _toy(name)
        with apply(model, TaylorSeer(warmup=1, interval=2, sites="output")) as handle:
            full, forecast = _layers(model, (900, 800))
        assert full.paths and not forecast.paths, f"{name}: a layer was computed"
        assert handle.stats["taylorseer"]["forecast"] == 1
    model, settings = _toy("pixart"), TaylorSeer(warmup=2, interval=3, sites="output")
    with apply(model, settings):
        found = _run(model, 9)
    layer, seer = model.get_submodule("proj_out"), Forecaster(1)
    history: History | None = None
    step = -1

    def project(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal history, step
        step += 1
        if settings.full(step):
            history = seer.updated(history, step, (output,))
            return output
        return cast(Tensor, seer.forecast(history, step)[0])

    hook = layer.register_forward_hook(project)
    wanted = _run(model, 9)
    hook.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


# Runs of toys -------------------------------------------------------------------------------------


@torch.no_grad()
def _run(model: nn.Module, steps: int) -> Tensor:
    """Latents after a few steps from fixed noise."""
    family = anatomy.of(model)
    latents, timestep, condition = _inputs(model)
    for step in range(steps):
        time = torch.full_like(timestep, 990 - 20 * step)
        latents = latents - 0.1 * family.denoise(model, latents, time, condition)
    return latents


def _inputs(model: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    family = anatomy.of(model)
    generator = torch.Generator().manual_seed(0)
    return family.example(batch=2, **family.sizes[0], generator=generator)


def _seer(model: nn.Module) -> Any:
    """What decides for the method that is attached to a model."""
    module: Any = anatomy.of(model).branches[0].module
    return module.forward.around.site.seer


class Layers(TorchFunctionMode):
    """Counts the attentions of one call, and takes down which layers' weights it uses.

    Args:
        weights: paths of the layers, by the identity of their weights.
    """

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights, self.attentions, self.paths = weights, 0, set[str]()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.attentions += func is F.scaled_dot_product_attention
        self.paths |= {self.weights[id(arg)] for arg in args if id(arg) in self.weights}
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _layers(model: nn.Module, times: tuple[int, ...]) -> list[Layers]:
    """What each of some calls runs."""
    latents, timestep, condition = _inputs(model)
    kinds = (nn.Linear, nn.Conv2d)
    weights = {id(m.weight): path for path, m in model.named_modules() if isinstance(m, kinds)}
    found = []
    for time in times:
        now = torch.full_like(timestep, time)
        with Layers(weights) as layers:
            anatomy.of(model).denoise(model, latents, now, condition)
        found.append(layers)
    return found
