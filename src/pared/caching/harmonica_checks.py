"""What must hold of HarmoniCa without trained weights: its paper's mathematics, on toys.

Run by `pared check harmonica`.
"""

import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pared import anatomy
from pared.anatomy import presets
from pared.caching.harmonica import INFO, HarmoniCa
from pared.caching.harmonica_soft import Mixing, ProxyReading, Router, ends, iepo, proxies
from pared.caching.harmonica_tables import Routing, cur_of, table_all, table_random
from pared.caching.harmonica_training import Lesson, RouterTraining
from pared.caching.trajectory import Condition, Conditions, Trajectories
from pared.method import apply
from pared.runtime import detour

STEPS = 5


def toy(name: str) -> tuple[Any, Conditions]:
    """What a training asks of a pipeline, around a toy; and conditions for it."""
    model = presets.build(f"toy:{name}", device="cpu")
    flow = name in ("sd3", "flux", "wan")
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(clip_sample=False)
    family = anatomy.of(model)
    generator = torch.Generator().manual_seed(0)
    entries = family.example(3, 8, 8, text_tokens=5, generator=generator)[2]
    null = {name: torch.zeros_like(entry[:1]) for name, entry in entries.items()}
    if "mask" in null:
        null["mask"] += 1
    pipeline = SimpleNamespace(transformer=model, scheduler=scheduler, components={})
    return pipeline, Conditions(entries, null)


def loop_of(pipeline: Any, conditions: Conditions) -> tuple[Trajectories, Condition, Tensor]:
    """The sampling loop of a toy with guidance, two samples' condition, and their noise."""
    video = "frames" in anatomy.of(pipeline.transformer).sizes[0]
    size = (2, 8, 8) if video else (8, 8)
    trajectories = Trajectories(pipeline, STEPS, guidance=2.0, size=size)
    generator = torch.Generator().manual_seed(1)
    given = conditions.draw(2, generator)
    noise = torch.randn(2, *trajectories.shape, generator=generator)
    return trajectories, trajectories.condition(given, conditions.null), noise


@torch.no_grad()
def sampled(trajectories: Trajectories, condition: Condition, noise: Tensor) -> Tensor:
    """Final latents."""
    point = trajectories.start(noise)
    while point.step < trajectories.steps:
        point = trajectories.move(point, trajectories.predict(point, condition))
    return point.latents


def sampled_hard(
    trajectories: Trajectories, conditions: Conditions, scores: Tensor, run: tuple[Any, ...]
) -> tuple[Tensor, dict[str, Any]]:
    """Final latents under a router of these scores, read from its file; and what was counted."""
    sites = tuple(branch.path for branch in trajectories.family.branches)
    routing = Routing(scores, sites, trajectories.told(conditions), tau=0.1)
    with tempfile.TemporaryDirectory() as folder:
        file = routing.save(Path(folder) / "router.safetensors")
        with apply(trajectories.family.model, HarmoniCa(router=str(file))) as handle:
            return sampled(trajectories, *run), handle.stats[INFO.slug]


def check_all_computed() -> None:
    """Where theta is 5 everywhere a run is the model's own, bit for bit, and CUR is 0."""
    for name in INFO.families:
        pipeline, conditions = toy(name)
        trajectories, *run = loop_of(pipeline, conditions)
        sites = len(trajectories.family.branches)
        scores = torch.full((STEPS, sites), 5.0).sigmoid()
        found, counts = sampled_hard(trajectories, conditions, scores, tuple(run))
        assert torch.equal(found, sampled(trajectories, *run)), f"{name}: the run changed"
        assert counts["reused"] == counts["bytes"] == 0 and counts["computed"] == STEPS * sites
        assert cur_of(scores > 0.1) == 0
    assert cur_of(table_all(3, 4)) == 0


class _Counter:
    """Goes around a branch, nearer to it than the method, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return own(*args, **kwargs)


def check_calls() -> None:
    """Branches are computed as often as the table says, the whole first step among it."""
    for name in INFO.families:
        pipeline, conditions = toy(name)
        trajectories, *run = loop_of(pipeline, conditions)
        branches = trajectories.family.branches
        table = table_random(0.5, 3, STEPS, len(branches))
        counters = [_Counter() for _ in branches]
        with ExitStack() as undo:
            for branch, counter in zip(branches, counters, strict=True):
                detour(branch.module, counter, undo)
            scores = table.float() * 0.8 + 0.05  # 0.85 and 0.05
            trajectories.told(conditions)
            before = [counter.calls for counter in counters]
            _, counts = sampled_hard(trajectories, conditions, scores, tuple(run))
        # To learn the timesteps costs a call of each step, here and in `sampled_hard`.
        calls = [c.calls - b - STEPS for c, b in zip(counters, before, strict=True)]
        assert calls == table.sum(dim=0).tolist(), f"{name}: {calls}"
        by_site = [counts["by_site"][branch.path]["computed"] for branch in branches]
        assert by_site == calls and counts["computed"] == int(table.sum())


def check_soft_is_hard() -> None:
    """The soft model at scores of 0 and 1 is the executor, bit for bit, with what it keeps."""
    for name in INFO.families:
        pipeline, conditions = toy(name)
        trajectories, *run = loop_of(pipeline, conditions)
        rows = table_random(0.5, 0, STEPS, len(trajectories.family.branches)).float()
        hard, _ = sampled_hard(trajectories, conditions, rows, tuple(run))
        assert not torch.equal(hard, sampled(trajectories, *run)), "nothing was reused"
        with ExitStack() as undo:
            mixing = Mixing(trajectories.family, 0.1, undo)
            assert torch.equal(_ends_reference(trajectories, mixing, rows, *run), hard), name


@torch.no_grad()
def _ends_reference(
    trajectories: Trajectories, mixing: Mixing, rows: Tensor, condition: Condition, noise: Tensor
) -> Tensor:
    """Final latents of a whole soft run; what `ends` must give, run by run."""
    mixing.kept = {}
    point = trajectories.start(noise)
    for row in rows:
        with mixing.soft(row):
            prediction = trajectories.predict(point, condition)
        point = trajectories.move(point, prediction)
    return point.latents


def check_gradients() -> None:
    """A step's loss moves its own row of the router and nothing else; the first row never moves."""
    pipeline, conditions = toy("pixart")
    settings = RouterTraining(
        steps=STEPS, guidance=2.0, size=(8, 8), batch_size=2, learning_rate=0.1
    )
    with ExitStack() as undo:
        lesson = Lesson(pipeline, conditions, settings, undo)
        trajectories, condition, noise = loop_of(pipeline, conditions)
        point = trajectories.start(noise)
        for step in range(3):
            with lesson.mixing.soft(lesson.router(step)):
                prediction = trajectories.predict(point, condition)
            if step < 2:
                # Detached as in the training, while what is kept comes from a call with a graph.
                point = trajectories.move(point, prediction.detach())
        row = lesson.router(2)
        full = torch.zeros_like(prediction)
        sum(iepo(full, prediction, torch.tensor(1.0), row, 0.1)).backward()
        moved = [theta.grad is not None for theta in lesson.router.theta]
        assert moved == [False, False, True, False, False], moved
        assert torch.as_tensor(lesson.router.theta[2].grad).all(), "a score has no gradient"
        model = trajectories.family.model
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        lesson.router.zero_grad()
        before = lesson.router.scores()
        lesson.one_trajectory(0)
        changed = (lesson.router.scores() != before).any(dim=1).tolist()
        assert changed == [False, True, True, True, True], changed
        assert (lesson.router.theta[0] == 5).all()


def check_proxies() -> None:
    """lambda is that of T whole runs, telescopes, is 0 where r = 1, and leaves no trace."""
    for name in ("dit", "flux"):
        pipeline, conditions = toy(name)
        trajectories, condition, noise = loop_of(pipeline, conditions)
        sites = len(trajectories.family.branches)
        rows = Router(STEPS, sites, torch.Generator().manual_seed(2)).scores()
        rows[2] = 1
        with ExitStack() as undo:
            mixing = Mixing(trajectories.family, 0.1, undo)
            mixing.kept = kept = {"a branch": noise}
            state, given = torch.get_rng_state(), rows.clone()
            readings: tuple[ProxyReading, ...] = ("telescoping", "single")
            found = {
                reading: ends(
                    trajectories, mixing, rows, trajectories.start(noise), condition, reading
                )
                for reading in readings
            }
            assert mixing.kept is kept and kept.keys() == {"a branch"}, "the cache was touched"
            assert torch.equal(rows, given) and torch.equal(torch.get_rng_state(), state)
            for reading, latents in found.items():
                for step in range(STEPS):
                    mask = torch.ones_like(rows)
                    reused = slice(1 if reading == "telescoping" else step, step + 1)
                    if step:
                        mask[reused] = rows[reused]
                    wanted = _ends_reference(trajectories, mixing, mask, condition, noise)
                    assert torch.equal(latents[step], wanted), f"{name}, {reading}, {step}"
        steps = found["telescoping"]
        changes = [after - before for before, after in pairwise(steps)]
        torch.testing.assert_close(sum(changes), steps[-1] - steps[0], rtol=0, atol=1e-5)
        for reading, latents in found.items():
            weights = proxies(latents, reading)
            assert weights[0] == weights[2] == 0 and (weights[[1, 3, 4]] > 0).all(), weights


def check_size() -> None:
    """DiT-XL/2 at T = 20 has 1,120 scores: 20 vectors of 56."""
    router = Router(20, 56, torch.Generator().manual_seed(0))
    assert [tuple(theta.shape) for theta in router.state_dict().values()] == [(56,)] * 20
    assert sum(theta.numel() for theta in router.parameters()) == 1120
    # Of all entries but the first step's: at theta > -2.2 a branch begins as computed.
    assert (router.scores() > 0.1).float().mean() > 0.95
