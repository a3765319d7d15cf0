"""Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers.

arXiv 2406.01125, 2024.

Every other step a run of consecutive blocks is passed by, and what the run changed at the step
before, its Delta, is added to the tokens of now; so the latents of now still come through, where a
cache of the run's output would replace them. Front blocks make outlines and rear blocks details:
rear blocks are passed by in the early steps, front blocks in the late ones.

Implemented from the paper; no code taken, none is released. Left open by the paper and chosen here:
a full step stores the Deltas that the steps until the next one need, and drops others; without
`cached` the blocks are counted from the cost aimed at, which is an exact inversion of the cost of
the blocks; a Delta is computed and kept in float32 or finer, per stream of tokens; with `order` it
is forecast by TaylorSeer's series (arXiv 2503.06923). Where the paper says nothing: a call whose
Delta is missing or older than the last full step computes everything, as one does that skip-layer
guidance makes without the first or the last block of the run. Steps are the scheduler's: where one
of second order (Heun) goes round twice for a step, both rounds are full or neither, and rounds of
each kind, predictors and correctors, have Deltas of their own; started from a picture, steps are
those that are run. U-Nets aren't served: between blocks their tokens change in number and width, so
that what a run of them does is no change that could be added; `deepcache` is made for them. Not
verified: quality at the paper's scale.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import Field, model_validator

from pared import anatomy
from pared.anatomy import Family
from pared.anatomy.base import Block
from pared.errors import InputError
from pared.info import Headline, Info
from pared.method import Claim, Handle, RuntimeMethod, denoiser
from pared.nn.forecast import Forecaster, Stored, Streams, changed, changes
from pared.runtime import Clock, detour

INFO = Info(
    slug="delta-dit",
    title="Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers",
    arxiv="2406.01125",
    venue="2024",
    kind="runtime",
    families=("pixart", "dit", "sd3", "flux", "wan", "lumina"),
    training=False,
    exact=False,
    maturity="faithful",
    summary="runs of blocks passed by at every other step, their last change added instead",
    cls="DeltaDiT",
    headlines=(
        Headline(
            key="cost-1024",
            text="multiply-adds of 20 steps of PixArt at 1024x1024 without attention products, "
            "full over Delta-DiT with 21 of 28 blocks",
            paper=1.6,
            direction="higher",
            bound=1.59,
        ),
        Headline(
            key="distance-feature-map-over-delta",
            text="distance to the full model's pictures at 20 steps, a cache of the run's output "
            "over one of its change, the smallest of front, middle and rear thirds "
            "(paper: Faster Diffusion over Delta-DiT, FID 42.76 / 35.88)",
            paper=1.19,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-fewer-steps-over-delta",
            text="distance to the full model's pictures, 13 of 20 steps over Delta-DiT at the same "
            "cost (paper: FID 39.99 / 35.88)",
            paper=1.11,
            direction="higher",
            bound=1.0,
        ),
    ),
    grid=("speedup=1.3", "", "interval=3,speedup=2", "interval=3,speedup=2.5"),
)


class DeltaDiT(RuntimeMethod):
    """Delta-Cache and its stages, section 4 of the paper.

    The paper runs PixArt-alpha for 20 steps with 21 of 28 blocks cached and b = 12. A bare denoiser
    doesn't say how many steps a run has: give `boundary` as a number of steps there, or `steps`.
    """

    info = INFO

    interval: int = Field(default=2, ge=1, description="N, steps from one full step to the next")
    cached: int | None = Field(
        default=None, ge=1, description="N_c, blocks of a run; None: as many as `speedup` takes"
    )
    speedup: float = Field(
        default=1.6, gt=1, description="cost of the blocks, full over cached, to aim at"
    )
    boundary: int | float = Field(
        default=0.6, ge=0, description="b, steps before the late stage; a fraction is of all steps"
    )
    rule: Literal["rear_then_front", "rear", "front", "middle"] = Field(
        default="rear_then_front", description="which blocks are passed by, before b and from it on"
    )
    reuse: Literal["delta", "feature_map"] = Field(
        default="delta", description="the run's change, or its output, the paper's baseline"
    )
    order: int = Field(default=0, ge=0, description="0 reuses the Delta, from 1 on it's forecast")
    dtype: Stored | None = Field(
        default=None, description="to store Deltas in; None: float32, finer where the tokens are"
    )
    steps: int | None = Field(
        default=None, ge=1, description="of a run; None asks the pipeline, which knows its own"
    )

    @model_validator(mode="after")
    def _fitting(self) -> "DeltaDiT":
        if self.cached is None and self.speedup > self.interval:
            raise ValueError(
                f"speedup={self.speedup} can't be had with interval={self.interval}, which gives "
                f"at most {self.interval}"
            )
        if isinstance(self.boundary, float) and self.boundary > 1:
            raise ValueError(
                f"boundary={self.boundary} is no fraction of the steps; give at most 1.0, or a "
                "whole number of steps"
            )
        return self

    @property
    def stages(self) -> list[str]:
        """Where the run lies: always, or before the boundary and from it on."""
        return self.rule.split("_then_")

    def count(self, blocks: int) -> int:
        """N_c of so many blocks, from 1 / speedup = 1 / N + (1 - 1 / N) (1 - N_c / N_b)."""
        if self.cached is not None:
            return self.cached
        wanted = (1 - 1 / self.speedup) * blocks * self.interval / (self.interval - 1)
        # Up to the next whole block, but not for an error of rounding.
        return min(blocks, math.ceil(wanted - 1e-9))

    def run_of(self, stage: str, blocks: int) -> range:
        """The N_c blocks in front, in the middle or in the rear of so many."""
        count = self.count(blocks)
        start = {"front": 0, "middle": (blocks - count) // 2, "rear": blocks - count}[stage]
        return range(start, start + count)

    def run_at(self, step: int, blocks: int, steps: int | None) -> range:
        """The blocks that a step passes by, unless it's a full one.

        Args:
            step: of a run of the pipeline, from 0.
            blocks: N_b, how many the model has.
            steps: T, how many steps the run has; None where nobody knows.

        Raises:
            InputError: the boundary is a fraction of an unknown number.
        """
        late = len(self.stages) > 1 and step >= self._boundary(steps)
        return self.run_of(self.stages[late], blocks)

    def _boundary(self, steps: int | None) -> int:
        if isinstance(self.boundary, int):
            return self.boundary
        if steps is None:
            raise InputError(
                f"delta-dit: boundary={self.boundary} is a fraction of the steps, and a denoiser "
                "alone doesn't say how many a run has; give steps, or the boundary as a whole "
                "number of steps, or apply the method to a pipeline."
            )
        return round(self.boundary * steps)

    def claims(self, family: Family) -> list[Claim]:
        return [Claim(block.path, "reuses") for block in self.blocks(family)]

    def blocks(self, family: Family) -> list[Block]:
        """All blocks that some step may pass by.

        Raises:
            InputError: the model has fewer blocks than `cached`.
        """
        blocks, count = family.blocks, self.count(len(family.blocks))
        if count > len(blocks):
            raise InputError(
                f"delta-dit: cached={count} is more than the {len(blocks)} blocks of "
                f"{type(family.model).__name__}."
            )
        runs = [self.run_of(stage, len(blocks)) for stage in self.stages]
        return [block for block in blocks if any(block.index in run for run in runs)]

    def attach(self, pipeline: Any) -> Handle:
        family = anatomy.of(denoiser(pipeline))
        blocks = self.blocks(family)
        bare = pipeline is denoiser(pipeline)
        if bare:  # nobody will say how many steps there are
            self.run_at(0, len(family.blocks), self.steps)
        with ExitStack() as undo:
            clock = Clock(pipeline, undo, self.steps if bare else None)
            deltas = Deltas(self, clock, len(family.blocks))
            for block in blocks:
                detour(block.module, PassedBy(deltas, block), undo)
            return Handle(undo.pop_all(), (self,), clock.stats)


# In the model -------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What becomes of runs of blocks at a call.

    Attributes:
        runs: that are passed by (one), or whose Deltas are stored.
        passed: whether they are passed by.
    """

    runs: tuple[range, ...]
    passed: bool


class Deltas:
    """The Deltas of a model's runs of blocks, and what happens to them at the running call.

    The clock keeps a history for each run, under the run itself and the kind of round: where the
    scheduler makes several rounds of a step, each has its own.

    Args:
        settings: of the method.
        clock: of the run.
        blocks: N_b, how many the model has.
    """

    def __init__(self, settings: DeltaDiT, clock: Clock, blocks: int) -> None:
        self.settings, self.clock, self.blocks = settings, clock, blocks
        self.forecaster = Forecaster(settings.order, dtype=settings.dtype)
        clock.on_call = self.decide

    @property
    def plan(self) -> Plan:
        """Of the running call."""
        return cast(Plan, self.clock.plan)

    @property
    def step(self) -> int:
        """The running step, of its scheduler's count."""
        return self.clock.step // self.clock.order

    @property
    def steps(self) -> int | None:
        """Steps of the run, likewise; None where nobody knows."""
        given, rounds = self.settings.steps, self.clock.steps
        return given if given or rounds is None else -(-rounds // self.clock.order)

    @property
    def kind(self) -> int:
        """The running round's place within its step."""
        return self.clock.step % self.clock.order

    def decide(self) -> Plan:
        step, kept = self.step, self.clock.kept
        every, run = self.settings.interval, self._run(step)
        ages = {of: step - h.steps[0] for (kind, of), h in kept.items() if kind == self.kind}
        if step % every and run in ages and ages[run] < every:
            return Plan((run,), passed=True)
        plan = Plan(self._needed(), passed=False)
        for other in ages.keys() - plan.runs:
            del kept[self.kind, other]
        return plan

    def did(self, path: str, passed: bool) -> None:
        """Note what became of a block at the running call."""
        instead = "forecast" if self.settings.order else "reused"
        self.clock.done[path] = instead if passed else "computed"

    def _run(self, step: int) -> range:
        return self.settings.run_at(step, self.blocks, self.steps)

    def _needed(self) -> tuple[range, ...]:
        """The runs that the steps until the next full one pass by."""
        step, every, steps = self.step, self.settings.interval, self.steps
        end = step + every - step % every
        coming = range(step + 1, end if steps is None else min(end, steps))
        return tuple(dict.fromkeys(self._run(later) for later in coming))

    def enter(self, run: range, tokens: Streams) -> None:
        """Note what comes into a run: no block writes into it before the run ends."""
        self.clock.passing[run] = tokens

    def store(self, run: range, outputs: Streams) -> None:
        """Keep a run's Delta, or its output; a call that left out its first block has none."""
        key, kept, settings = (self.kind, run), self.clock.kept, self.settings
        entered = self.clock.passing.pop(run, None)
        if entered is None:
            return
        if settings.reuse == "delta":
            fine = getattr(torch, settings.dtype or "float32")
            outputs = changes(entered, outputs, fine)
        kept[key] = self.forecaster.updated(kept.get(key), self.step, outputs)

    def restored(self, run: range) -> Streams:
        """What comes out of a run that was passed by."""
        entered = self.clock.passing.pop(run)
        known = self.forecaster.forecast(self.clock.kept[self.kind, run], self.step)
        if self.settings.reuse == "delta":
            return changed(entered, known)
        # Text that the last block has no use for goes through.
        return tuple(x if y is None else y for x, y in zip(entered, known, strict=True))


class PassedBy:
    """Goes around a block: as it is at a full step, and past it within the run of a plan.

    The Delta is added behind the last block and not at the first, since what a pipeline adds
    between the blocks of the run (a control net) is in the Delta already.

    torch.compile takes the block's own forward and leaves what is around it to Python.
    """

    def __init__(self, deltas: Deltas, block: Block) -> None:
        self.deltas, self.block = deltas, block

    @torch.compiler.disable(recursive=False)
    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.passes(args, kwargs):
            return self.passed(args, kwargs)
        result = own(*args, **kwargs)
        self.keep(result)
        return result

    @torch.compiler.disable
    def passes(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the running call passes it by; what comes into a run is noted."""
        for run in self._runs():
            if self.block.index == run[0]:
                self.deltas.enter(run, self.block.tokens(args, kwargs))
        return bool(self._runs()) and self.deltas.plan.passed

    @torch.compiler.disable
    def passed(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What comes out then: what came in, or behind the run's last block what it would give."""
        (run,) = self._runs()
        self.deltas.did(self.block.path, passed=True)
        last = self.block.index == run[-1]
        streams = self.deltas.restored(run) if last else self.block.tokens(args, kwargs)
        return self.block.result(streams)

    @torch.compiler.disable
    def keep(self, result: Any) -> None:
        """Remember the Deltas of runs that end here."""
        self.deltas.did(self.block.path, passed=False)
        for run in self._runs():
            if self.block.index == run[-1]:
                self.deltas.store(run, self.block.outputs(result))

    def _runs(self) -> list[range]:
        """Those of the plan that the block is in."""
        return [run for run in self.deltas.plan.runs if self.block.index in run]
