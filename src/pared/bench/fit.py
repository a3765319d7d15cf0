"""The best way to run a pipeline under a budget, found by measured successive halving.

Candidates are run-time methods from the grids of their records, and the pipeline itself with fewer
steps. Rounds paint more and more pictures with fewer and fewer candidates: every picture is painted
by all of them in turn, from the same noise as by the whole model, so that time and distance come
from the same runs and what disturbs the machine disturbs all alike. After the first round, those
that no other beats in both join in pairs. After each round the candidates that miss the budget
beyond doubt go, and then the worse half of the rest (successive halving: Jamieson and Talwalkar,
arXiv 1502.07943).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from pared import method
from pared.bench import fidelity, grid
from pared.bench.graphs import pareto
from pared.bench.grid import Stack
from pared.bench.quality import PSNR_CAP
from pared.bench.subjects import PipelineSubject, Sample, usual_prompts
from pared.errors import InputError

# Pictures that the first round adds; each round adds as many as all before it.
FIRST = 2
# Candidates that the last round compares, at most.
FINALISTS = 4
# How far beside the budget a candidate may be after one picture and still be tried on; the room
# shrinks with the root of the pictures.
ROOM_SECONDS, ROOM_DECIBELS = 0.3, 6.0


@dataclass(frozen=True)
class Budget:
    """What must hold: exactly one of the two is set.

    Attributes:
        seconds: of a picture, at most.
        decibels: mean PSNR to the whole model's pictures, at least.
    """

    seconds: float | None = None
    decibels: float | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.decibels is None):
            raise InputError("give a latency in seconds or a quality in decibels, one of the two.")

    def __str__(self) -> str:
        return f"{self.seconds:g} s" if self.seconds is not None else f"{self.decibels:g} dB"


@dataclass
class Trial:
    """One candidate, and what was measured of it.

    Attributes:
        stack: specs of run-time methods; none for the pipeline itself.
        steps: of a run.
        seconds: of each picture.
        decibels: PSNR of each picture to the whole model's.
    """

    stack: Stack
    steps: int
    seconds: list[float] = field(default_factory=list)
    decibels: list[float] = field(default_factory=list)

    @property
    def time(self) -> float:
        """Median seconds of a picture."""
        return statistics.median(self.seconds)

    @property
    def quality(self) -> float:
        """Mean decibels."""
        return statistics.fmean(self.decibels)

    def keeps(self, budget: Budget, room: float = 0.0) -> bool:
        """Whether it stays within a budget, widened by `room` (1 is the whole room)."""
        if budget.seconds is not None:
            return self.time <= budget.seconds * (1 + room * ROOM_SECONDS)
        assert budget.decibels is not None
        return self.quality >= budget.decibels - room * ROOM_DECIBELS

    def merit(self, budget: Budget) -> float:
        """What decides among those that keep the budget: quality, or speed."""
        return self.quality if budget.seconds is not None else -self.time


@dataclass(frozen=True)
class Conditions:
    """What a budget was measured with, and holds for.

    Attributes:
        model: that was fitted, as it was named.
        sampler: class of its scheduler.
        dtype: of its weights, as `torch` names it.
        call: arguments of the pipeline's call, beside prompt and steps.
    """

    model: str
    sampler: str
    dtype: str
    call: dict[str, Any]


@dataclass(frozen=True)
class Plan(Conditions):
    """How to run a model: what `pared sample` takes of a file that `Fit.save` wrote.

    Attributes:
        stack: specs of run-time methods.
        steps: of a run.
    """

    stack: Stack
    steps: int


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        best: the candidate to use.
        base: the whole pipeline.
        trials: all candidates, those measured longest first.
        budget: that was asked for.
        complete: whether the search came to its end.
        conditions: what it holds for.
    """

    best: Trial
    base: Trial
    trials: tuple[Trial, ...]
    budget: Budget
    complete: bool
    conditions: Conditions

    def to_dict(self) -> dict[str, Any]:
        """The plan that `pared sample --plan` takes, with what was measured."""
        return {
            **asdict(self.conditions),
            "with": list(self.best.stack),
            "steps": self.best.steps,
            "budget": {k: v for k, v in asdict(self.budget).items() if v is not None},
            "complete": self.complete,
            "versions": method.versions(),
            "base": _row(self.base),
            "trials": [_row(trial) for trial in self.trials],
        }

    def save(self, path: str | Path) -> Path:
        """Write the plan, beside and renamed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.part")
        beside.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        beside.replace(path)
        return path


def _row(trial: Trial) -> dict[str, Any]:
    return {
        "with": list(trial.stack),
        "steps": trial.steps,
        "pictures": len(trial.seconds),
        "seconds": round(trial.time, 4),
        "decibels": round(trial.quality, 2),
    }


def read_plan(path: str | Path) -> Plan:
    """A plan that `Fit.save` wrote.

    Raises:
        InputError: the file isn't there, or is no such plan.
    """
    try:
        plan = json.loads(Path(path).read_text())
        return Plan(
            model=str(plan["model"]),
            sampler=str(plan["sampler"]),
            dtype=str(plan["dtype"]),
            call=dict(plan["call"]),
            stack=tuple(str(spec) for spec in plan["with"]),
            steps=int(plan["steps"]),
        )
    except OSError:
        raise InputError(f"there is no plan {path}; `pared fit` writes one.") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no plan as `pared fit` writes it.") from None


def fit(
    pipeline: Any,
    latency: float | None = None,
    quality: float | None = None,
    methods: Sequence[str] = (),
    prompts: Sequence[Any] | None = None,
    pictures: int = 8,
    pairs: bool = True,
    on_round: Callable[[list[Trial], int], None] | None = None,
    on_picture: Callable[[int, int], None] | None = None,
    name: str | None = None,
    **call: Any,
) -> Fit:
    """Find the best way to run a pipeline under a budget.

    Args:
        pipeline: text-to-image or class-to-image.
        latency: seconds a picture, at most; the nearest to the whole model's pictures wins.
        quality: mean PSNR in dB to the whole model's pictures, at least; the fastest wins.
        methods: slugs to choose among; by default all run-time methods that serve the model.
        prompts: what to paint, in turn.
        pictures: that the last round has painted with each finalist, at least 1.
        pairs: try the best methods in pairs too.
        on_round: is told the candidates left and the pictures of each, before a round.
        on_picture: is told (paintings done, paintings of this round).
        name: of the model, to stand in the plan; by default where the pipeline was loaded from.
        call: further arguments of the pipeline's call, `num_inference_steps` among them.

    Returns:
        The fit; after Ctrl-C, from what was measured until then.

    Raises:
        InputError: the budget is none, or no candidate keeps it; the message says what comes
            nearest.
    """
    budget = Budget(latency, quality)
    prompts = list(prompts or usual_prompts(pipeline))
    samples = [Sample(prompts[i % len(prompts)], i) for i in range(max(1, pictures))]
    subject = PipelineSubject(pipeline, samples, call)
    if subject.steps is None:
        raise InputError(f"{type(pipeline).__name__} has no number of steps; give one.")
    specs = grid.settings(grid.family_of(pipeline), methods)
    stacks = grid.attachable(subject.target, specs)
    trials = [Trial(stack, subject.steps) for stack in stacks] + _fewer(subject.steps)
    search = Search(subject, budget, trials, on_round or _silent, on_picture or _silent)
    return search.run(pairs, _conditions(subject, name))


def _conditions(subject: PipelineSubject, name: str | None) -> Conditions:
    place = name or getattr(subject.target, "name_or_path", None)
    return Conditions(
        model=str(place or type(subject.target).__name__),
        sampler=type(subject.target.scheduler).__name__,
        dtype=str(subject.model.dtype).removeprefix("torch."),
        call=subject.settings,
    )


def _silent(*_: Any) -> None:
    """For those who want to be told nothing."""


def _fewer(steps: int) -> list[Trial]:
    """The pipeline itself with fewer steps: all of them up to 8, then about every tenth."""
    counts = {max(1, round(steps * share / 10)) for share in range(1, 10)}
    return [Trial((), count) for count in sorted(counts - {steps})]


class Search:
    """Successive halving, from all candidates to one."""

    def __init__(
        self,
        subject: PipelineSubject,
        budget: Budget,
        trials: list[Trial],
        on_round: Callable[[list[Trial], int], None],
        on_picture: Callable[[int, int], None],
    ) -> None:
        self.subject, self.budget, self.alive = subject, budget, trials
        self.on_round, self.on_picture = on_round, on_picture
        self.base = Trial((), subject.steps or 1)
        self.all = [self.base, *trials]
        self.wanted: list[torch.Tensor] = []  # the whole model's pictures

    def run(self, pairs: bool, conditions: Conditions) -> Fit:
        """Rounds until the pictures are used up; after the first, pairs join if they may."""
        total, done, complete = len(self.subject.samples), 0, True
        self.subject.run()  # not counted: the first run loads and compiles
        try:
            while done < total:
                more = min(max(FIRST, done), total - done)
                self._round(self.alive, done, done + more)
                if pairs and done == 0:
                    joined = self._pairs()
                    self.all += joined
                    self._round(joined, 0, more)
                    self.alive = [*self.alive, *joined]
                done += more
                self.alive = self._survivors(done, last=done >= total)
        except KeyboardInterrupt:
            complete = False
            if not any(trial.seconds for trial in self.alive):
                raise
        return self._fit(complete, conditions)

    def _round(self, trials: Sequence[Trial], start: int, stop: int) -> None:
        """Pictures number `start` to `stop` of some candidates, the whole model's first."""
        if not trials:
            return
        self.on_round(list(trials), stop - start)
        arms = [self.base, *trials]
        for number, sample in enumerate(self.subject.samples[start:stop], start):
            for turn, trial in enumerate(arms):
                seconds, image = self._painted(trial, sample)
                if number == len(self.wanted):
                    self.wanted.append(image)
                trial.seconds.append(seconds)
                psnr = fidelity.psnr(image, self.wanted[number]).clamp(max=PSNR_CAP)
                trial.decibels.append(float(psnr))
                done = (number - start) * len(arms) + turn + 1
                self.on_picture(done, (stop - start) * len(arms))

    def _pairs(self) -> list[Trial]:
        """Two methods together, of those that no other setting beats in both time and quality."""
        alone = [trial for trial in self.alive if trial.stack]
        best = pareto([(trial.time, trial.quality) for trial in alone], higher=True)
        specs = [alone[number].stack[0] for number in best]
        stacks = grid.attachable(self.subject.target, specs, pairs=True)
        return [Trial(stack, self.base.steps) for stack in stacks if len(stack) == 2]

    def _painted(self, trial: Trial, sample: Sample) -> tuple[float, torch.Tensor]:
        with method.apply(self.subject.target, *grid.methods_of(trial.stack)):
            start = perf_counter()
            image = self.subject.paint([sample], trial.steps)
            return perf_counter() - start, image

    def _survivors(self, pictures: int, last: bool) -> list[Trial]:
        """Those near the budget, the better half of them; in the end all that keep it."""
        if last:
            return [trial for trial in self.alive if trial.keeps(self.budget)]
        room = pictures**-0.5
        near = [trial for trial in self.alive if trial.keeps(self.budget, room)]
        if not near:
            return self.alive  # the end will say how far the nearest is
        near.sort(key=lambda trial: trial.merit(self.budget), reverse=True)
        return near[: max(FINALISTS, len(near) // 2)]

    def _fit(self, complete: bool, conditions: Conditions) -> Fit:
        measured = [trial for trial in self.all if trial.seconds]
        finalists = [t for t in self.alive if t.seconds and t.keeps(self.budget)]
        # Where all that came so far miss it in the end, others that had to go may keep it.
        keeping = [t for t in [self.base, *(finalists or measured)] if t.keeps(self.budget)]
        if not keeping:
            raise InputError(("" if complete else "until Ctrl-C ") + self._nearest(measured))
        best = max(keeping, key=lambda trial: trial.merit(self.budget))
        others = sorted(measured[1:], key=lambda t: (-len(t.seconds), -t.merit(self.budget)))
        return Fit(best, self.base, tuple(others), self.budget, complete, conditions)

    def _nearest(self, measured: list[Trial]) -> str:
        if self.budget.seconds is not None:
            least = min(trial.time for trial in measured)
            return (
                f"nothing paints a picture in {self.budget}: the fastest way takes {least:.3g} s; "
                "allow more time, or take fewer steps."
            )
        return f"nothing keeps {self.budget}; ask for less."
