"""What must hold of Delta-DiT without trained weights: its paper's mathematics.

Run by `pared check delta-dit`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import presets
from pared.caching.delta_dit import INFO, DeltaDiT
from pared.method import apply


def _toy(family: str = "pixart", layers: int | None = None) -> nn.Module:
    return presets.build(f"toy:{family}", device="cpu", layers=layers)


def check_off() -> None:
    """With N = 1 every step is full, bit for bit the model's own."""
    for name in INFO.families:
        model = _toy(name)
        wanted = _run(model, 4)
        with apply(model, DeltaDiT(interval=1, cached=1, steps=4)) as handle:
            assert torch.equal(_run(model, 4), wanted), f"{name}: the output differs"
        assert "reused" not in handle.stats["delta-dit"], "something was reused"


def check_same_inputs() -> None:
    """On the inputs of the full step the step behind it gives its output again.

    Within 1e-5 in float32, exactly where the Delta is kept in float64, and for every place.
    """
    for name in INFO.families:
        model = _toy(name)
        for rule in ("front", "middle", "rear"):
            for dtype, error in ((None, 1e-5), ("float64", 0.0)):
                method = DeltaDiT(cached=2, rule=rule, dtype=dtype)
                with apply(model, method) as handle:
                    full, again = _outputs(model, _inputs(model), (500.0, 500.0 - 1e-9))
                assert handle.stats["delta-dit"]["reused"] == 2, "nothing was passed by"
                worst = float((again - full).abs().max())
                assert worst <= error, f"{name}, {rule}, {dtype}: off by {worst:.1e}"


def check_all_blocks() -> None:
    """With all blocks passed by, the latents come through, and the blocks' weights don't matter.

    A cache of the run's output, in its place, gives the same whatever the latents.
    """
    for reuse in ("delta", "feature_map"):
        outputs = []
        for seed, stirred in ((1, False), (1, True), (2, False)):
            model = _toy("dit")
            with apply(model, DeltaDiT(cached=2, rule="rear", reuse=reuse)):
                _outputs(model, _inputs(model), (500.0,))
                if stirred:
                    # All but the modulations: the last layer uses the embeddings in the first one.
                    for site in anatomy.of(model).sites("self_attention", "feed_forward"):
                        for weight in site.module.parameters():
                            weight.data.add_(1)
                outputs += _outputs(model, _inputs(model, seed), (400.0,))
        assert torch.equal(outputs[0], outputs[1]), f"{reuse}: a block was computed"
        fresh = not torch.equal(outputs[0], outputs[2])
        assert fresh == (reuse == "delta"), f"{reuse}: the latents' part is wrong"


def check_trace() -> None:
    """T = 20, N = 2, b = 12, N_c = 21 of 28: blocks 0 to 6 at odd steps before b, then 21 to 27."""
    model = _toy(layers=28)
    for settings in ({"cached": 21, "boundary": 12}, {"steps": 20}):
        with apply(model, DeltaDiT(**settings)), _trace(model) as trace:
            _run(model, 20, side=4)
        for step, called in enumerate(trace):
            wanted = range(28) if step % 2 == 0 else range(7) if step < 12 else range(21, 28)
            assert called == [*wanted], f"step {step} called {called}"


def check_cost() -> None:
    """1/N + (1 - 1/N)(1 - N_c/N_b) of the blocks are called; 21 of 28 are the paper's 1.6."""
    assert DeltaDiT().count(28) == 21 and DeltaDiT(speedup=2).count(28) == 28
    assert 1 / _cost(2, 21, 28) == 1.6
    model = _toy(layers=4)
    for every in (1, 2, 3):
        for count in (1, 2, 3, 4):
            settings = DeltaDiT(interval=every, cached=count, boundary=3)
            with apply(model, settings), _trace(model) as trace:
                _run(model, 6, side=4)
            called = sum(map(len, trace)) / (6 * 4)
            assert abs(called - _cost(every, count, 4)) < 1e-12, f"{settings.spec()}: {called}"
            if every > 1:
                speedup = 1 / _cost(every, count, 4)
                assert DeltaDiT(interval=every, speedup=speedup).count(4) == count


def _cost(every: int, count: int, blocks: int) -> float:
    return 1 / every + (1 - 1 / every) * (1 - count / blocks)


def check_stages() -> None:
    """A boundary within a group of steps: no Delta is missing, stale or of the other run."""
    model = _toy(layers=6)
    for boundary in (4, 5, 6, 7):
        settings = DeltaDiT(interval=3, cached=2, boundary=boundary, steps=12)
        with apply(model, settings):
            clock = cast(Any, model).transformer_blocks[0].forward.around.deltas.clock
            seen: list[Any] = []
            hook = model.register_forward_pre_hook(
                lambda *_, of=clock, into=seen: into.append(
                    (of.plan, {run: history.steps[0] for (_, run), history in of.kept.items()})
                )
            )
            _run(model, 12, side=4)
            hook.remove()
        for step, (plan, stored) in enumerate(seen):
            assert plan.passed == (step % 3 > 0), f"step {step} of b={boundary}: {plan}"
            if plan.passed:
                wanted = range(4, 6) if step < boundary else range(2)
                assert plan.runs == (wanted,), f"step {step} of b={boundary} passes {plan.runs}"
                assert stored[wanted] == step - step % 3, f"a Delta of step {stored[wanted]}"


def check_order() -> None:
    """With order 1 the third step forecasts the Delta by the two before, in every family."""
    for name in INFO.families:
        model = _toy(name)
        count = len(anatomy.of(model).blocks)
        found = {}
        for order in (0, 1):
            with apply(model, DeltaDiT(cached=count, order=order, rule="front")) as handle:
                found[order] = _outputs(model, _inputs(model), (900.0, 800.0, 700.0, 600.0))
            assert ("forecast" in handle.stats["delta-dit"]) == (order == 1)
        for step in (0, 1, 2):  # of one Delta there is no difference yet
            assert torch.equal(found[0][step], found[1][step]), f"{name}: step {step} differs"
        assert not torch.equal(found[0][3], found[1][3]), f"{name}: nothing was forecast"


# Runs of toys -------------------------------------------------------------------------------------


def _inputs(model: nn.Module, seed: int = 0, side: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    family = anatomy.of(model)
    size = family.sizes[0] | {"height": side, "width": side}
    latents, _, condition = family.example(
        batch=2, **size, generator=torch.Generator().manual_seed(0)
    )
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return noise, condition


@torch.no_grad()
def _outputs(
    model: nn.Module, inputs: tuple[Tensor, dict[str, Tensor]], times: tuple[float, ...]
) -> list[Tensor]:
    """Of some steps on the same latents. Times in float64 can differ by less than models see."""
    latents, condition = inputs
    family = anatomy.of(model)
    return [
        family.denoise(model, latents, torch.full((2,), time, dtype=torch.float64), condition)
        for time in times
    ]


@torch.no_grad()
def _run(model: nn.Module, steps: int, side: int = 8) -> Tensor:
    """Latents after a few steps from fixed noise."""
    latents, condition = _inputs(model, side=side)
    family = anatomy.of(model)
    for step in range(steps):
        time = torch.full((2,), 990 * (1 - step / steps))
        latents = latents - 0.1 * family.denoise(model, latents, time, condition)
    return latents


@contextmanager
def _trace(model: nn.Module) -> Iterator[list[list[int]]]:
    """Which blocks compute their attention, call by call."""
    trace: list[list[int]] = []
    hooks = [model.register_forward_pre_hook(lambda *_: trace.append([]))]
    hooks += [
        site.module.register_forward_pre_hook(lambda *_, i=site.block: trace[-1].append(i))
        for site in anatomy.of(model).sites("self_attention")
    ]
    yield trace
    for hook in hooks:
        hook.remove()
