"""The soft model of HarmoniCa (arXiv 2410.01723), in which a table can learn, and its objective.

A branch's output is a mix of what it computes and what it kept, by a score r for each step and
branch. See `pared.caching.harmonica_training` for the loop.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.anatomy import Family
from pared.anatomy.sites import runs_twice
from pared.caching.harmonica import INFO, each
from pared.caching.trajectory import Condition, Point, Trajectories
from pared.runtime import detour

# theta of the first step, and the largest of all others.
LIMIT = 5.0

# What lambda is the change of: reuse is let in step by step, or at one step alone.
ProxyReading = Literal["telescoping", "single"]


class Router(nn.Module):
    """A score for every step and branch: T vectors theta, with r = sigmoid(theta).

    Args:
        steps: T.
        sites: branches of the model.
        generator: of theta ~ N(0, 1); the first row is 5 and doesn't learn.
    """

    def __init__(self, steps: int, sites: int, generator: torch.Generator) -> None:
        super().__init__()
        rows = [torch.randn(sites, generator=generator) for _ in range(steps)]
        rows[0] = torch.full((sites,), LIMIT)
        self.theta = nn.ParameterList(nn.Parameter(row) for row in rows)
        self.theta[0].requires_grad_(False)

    def forward(self, step: int) -> Tensor:
        """r of a step, (sites,)."""
        return self.theta[step].sigmoid()

    @torch.no_grad()
    def clamp_(self, step: int) -> None:
        """Keep theta of a step within [-5, 5]."""
        self.theta[step].clamp_(-LIMIT, LIMIT)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """r of all steps, (T, sites)."""
        return torch.stack([theta.sigmoid() for theta in self.theta])


def mixed(fresh: Any, kept: Any, r: Tensor) -> Any:
    """o = r f + (1 - r) c, for each stream of a branch."""
    return each(lambda f, c: r * f + (1 - r) * c, fresh, kept)


class Mixing:
    """Branches that mix their outputs softly with what they kept; outside of `soft`, the model.

    Args:
        family: whose branches mix from now on.
        tau: an output is kept iff r > tau.
        undo: gets what takes the mixing off.

    Attributes:
        kept: by path; empty at the beginning of a trajectory.
    """

    def __init__(self, family: Family, tau: float, undo: ExitStack) -> None:
        self.tau = tau
        self.kept: dict[str, Any] = {}
        self.row: Tensor | None = None
        self.keeps: list[bool] = []
        self.seen: set[str] = set()
        for index, branch in enumerate(family.branches):
            detour(branch.module, SoftBranch(self, index, branch.path), undo)

    @contextmanager
    def soft(self, row: Tensor) -> Iterator[None]:
        """Within the context branches mix by r, (sites,)."""
        self.row, self.keeps, self.seen = row, (row > self.tau).tolist(), set()
        try:
            yield
        finally:
            self.row = None


class SoftBranch:
    """Goes around a branch while a router is learned."""

    def __init__(self, mixing: Mixing, index: int, path: str) -> None:
        self.mixing, self.index, self.path = mixing, index, path

    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mixing, output = self.mixing, own(*args, **kwargs)
        if mixing.row is None:
            return output
        if self.path in mixing.seen:
            raise runs_twice(INFO.slug, self.path)
        mixing.seen.add(self.path)
        if self.path in mixing.kept:
            output = mixed(output, mixing.kept[self.path], mixing.row[self.index])
        # The mixed output is kept; at hard decisions (r = 1, kept, or r = 0, not) the fresh one.
        if mixing.keeps[self.index]:
            mixing.kept[self.path] = each(torch.detach, output)
        return output


# The objective ------------------------------------------------------------------------------------


def iepo(
    full: Tensor, cached: Tensor, proxy: Tensor, row: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The two terms of a step's loss: lambda mean((e_full - e_cache)^2), and beta sum r."""
    return proxy * F.mse_loss(cached, full), beta * row.sum()


@torch.no_grad()
def ends(
    trajectories: Trajectories,
    mixing: Mixing,
    rows: Tensor,
    start: Point,
    condition: Condition,
    reading: ProxyReading = "telescoping",
) -> list[Tensor]:
    """Final latents from one noise, with reuse let in at ever other steps.

    A run without reuse from some step on is the model's own from there, and the way up to there is
    shared: half of the T runs' calls are made.

    Args:
        trajectories: the sampling loop.
        mixing: of its denoiser; what it has kept stays as it is.
        rows: r, (T, sites).
        start: beginning of the trajectories.
        condition: of all calls.
        reading: reuse at steps 1 to s ("telescoping") or at step s alone ("single").

    Returns:
        The latents without reuse, then those of s = 1, ..., T - 1.
    """
    before, ones = mixing.kept, torch.ones_like(rows[0])

    def on(point: Point, kept: dict[str, Any], row: Tensor) -> tuple[Point, dict[str, Any]]:
        mixing.kept = dict(kept)
        with mixing.soft(row):
            prediction = trajectories.predict(point, condition)
        return trajectories.move(point, prediction), mixing.kept

    def end(point: Point) -> Tensor:
        while point.step < trajectories.steps:
            point = trajectories.move(point, trajectories.predict(point, condition))
        return point.latents

    try:
        shared = on(start, {}, ones)
        found = [end(shared[0])]
        for row in rows[1:]:
            reused = on(*shared, row)
            found.append(end(reused[0]))
            shared = reused if reading == "telescoping" else on(*shared, ones)
        return found
    finally:
        mixing.kept = before


def proxies(found: list[Tensor], reading: ProxyReading = "telescoping") -> Tensor:
    """lambda of each step, (T,), from the latents that `ends` gives: mean squared changes.

    Reuse at a step is held against the run before it (telescoping) or the one without any reuse
    (single). The first step's is 0.
    """
    others = found[:-1] if reading == "telescoping" else found[:1] * (len(found) - 1)
    pairs = zip(found[1:], others, strict=True)
    changes = [(z - other).square().mean() for z, other in pairs]
    return torch.stack([torch.zeros_like(changes[0]), *changes])
