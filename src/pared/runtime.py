"""The clock of a run: which step a call of the denoiser belongs to, and what is kept for it.

A run-time method sees the denoiser called again and again, and must know where in a run it is. The
clock reads that from the calls themselves, by hooks on the denoiser: no pipeline has to announce
anything. Three words:

- a *run* is one call of a pipeline, from noise to picture;
- a *step* is one round of the pipeline's loop, one entry of `scheduler.timesteps`. Schedulers of
  second order go round twice for what their users call a step (Heun: 2 n - 1 times for n);
- a *call* is one call of the denoiser within a step. Guidance on a joint batch makes one; guidance
  that calls for prompt and negative prompt in turn makes two, at the same timestep.

Timesteps fall during a run. This table says what a call begins; it is compared with the first call
of the running step, in its timestep, its latents, and the shapes, types and devices of all tensors.

| a call that comes                                              | begins a new                  |
|----------------------------------------------------------------|-------------------------------|
| first of all, or after a call that failed                      | run                           |
| with new `scheduler.timesteps` (every call of a pipeline)      | run                           |
| at a higher timestep                                           | run                           |
| at a lower timestep                                            | step; with other shapes, run  |
| at the same timestep, with the same latents                    | call                          |
| at the same timestep, with other latents: does the schedule    | step                          |
| repeat timesteps (Heun, PNDM)?                                 |                               |
| if not, or with other shapes (skip-layer guidance)             | call                          |

A bare denoiser has no schedule to ask. There, at the same timestep, other shapes or a mere
repetition of the first call begin a run, and so do other latents in a run's first step, which Heun
doesn't repeat; later on they begin a step. Two things can't be told without a pipeline: a run that
begins below the timestep where another broke off (between two calls), and guidance in turn on
*different* latents from a scheduler of second order. Apply the method to the pipeline where that
matters, or apply it anew for each run. A method on a pipeline takes its schedule at its word, so
whoever calls that pipeline's denoiser by hand, at one timestep all the time, makes calls of one
step, each with a memory of its own.

What a method keeps is kept for each call of a step apart (prompt and negative prompt never mix),
begins empty in every run, and is dropped behind the last step where the number of steps is known.
A call that finds nothing kept must compute everything; then a second run equals one in a fresh
process. Where two pipelines share a denoiser, what is applied to one works in both, and each run
of either begins afresh, since it begins at a high timestep.

A deep copy of a model carries its run-time methods along, with a clock of its own that starts
afresh and belongs to no pipeline. The handle takes them off the original alone.
"""

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.method import denoiser

# Shape, type and device of every tensor of a call.
Shapes = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


@dataclass(frozen=True)
class Reading:
    """What the clock reads from one call of the denoiser.

    Attributes:
        time: the timestep; the largest where tokens or samples have their own.
        rounding: the type in which the timestep came.
        latents: the denoiser's first argument.
        tensors: all arguments that are tensors.
        schedule: the pipeline's timesteps, or None where there is no pipeline.
    """

    time: float
    rounding: torch.dtype
    latents: Tensor
    tensors: tuple[Tensor, ...]
    schedule: Tensor | None

    @property
    def shapes(self) -> Shapes:
        return tuple((x.shape, x.dtype, x.device) for x in self.tensors)

    def repeats(self) -> bool:
        """Whether some step of the schedule has the timestep of the one before."""
        if self.schedule is None:
            return False
        # Half precision makes neighbours equal that weren't.
        rounded = self.schedule.to(self.rounding)
        return bool((rounded[1:] == rounded[:-1]).any())


class Clock:
    """Tells a method the time of a run, and keeps what it reuses.

    Args:
        target: a pipeline, or a bare denoiser.
        undo: gets what stops the clock.
        steps: of a run, for a bare denoiser; a pipeline knows its own, unless told otherwise.

    Attributes:
        on_call: called before each call of the denoiser, when the clock shows its time.
        step: number of the running step, from 0.
        call: number of the running call within its step, from 0.
        steps: of the run, or None where nobody knows.
        kept: what the method kept for this call of a step, under keys of its own choice; empty in
            the run's first step. Tensors in it, in tuples, lists or dictionaries too, are counted.
        stats: "runs" and "calls" so far, and "bytes", the most that was kept at a time; methods
            add what they count.

    Raises:
        InputError: the denoiser takes no timestep.
    """

    def __init__(self, target: Any, undo: ExitStack, steps: int | None = None) -> None:
        model = anatomy.unwrap(denoiser(target))
        # The class's own forward: offloading puts one without names over it.
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        if "timestep" not in self._names:
            raise InputError(
                f"{type(model).__name__} takes no timestep, so its calls can't be ordered into "
                "steps; run-time methods work on the denoisers of diffusion models."
            )
        self._pipeline = None if target is denoiser(target) else target
        self._given_steps = steps
        self.on_call: Callable[[], None] | None = None
        self.step, self.call, self.steps = 0, 0, steps
        self.kept: dict[Any, Any] = {}
        self.stats: dict[str, int] = {"runs": 0, "calls": 0, "bytes": 0}
        self._first: Reading | None = None  # the first call of the running step
        self._next: Reading | None = None  # the same, as soon as the running call has succeeded
        self._memory: dict[tuple[int, Shapes], dict[Any, Any]] = {}
        undo.callback(model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(self._end).remove)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The hook before a call: move the hands."""
        now, first = self._read(args, kwargs), self._first
        self._first = None  # a call that fails leaves it so
        begins = self._begins(now, first)
        self._next = first if begins == "call" else now
        if begins == "run":
            self._memory.clear()
            self.step, self.call, self.steps = 0, 0, self._steps(now.schedule)
            self.stats["runs"] += 1
        elif begins == "step":
            self.step, self.call = self.step + 1, 0
        else:
            self.call += 1
        self.stats["calls"] += 1
        self.kept = self._memory.setdefault((self.call, now.shapes), {})
        if self.on_call is not None:
            self.on_call()

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The hook behind a call that has succeeded."""
        self._first = self._next
        self.stats["bytes"] = max(self.stats["bytes"], held_bytes(self._memory))
        if self.steps is not None and self.step == self.steps - 1:
            self.kept.clear()

    def _read(self, args: tuple, kwargs: dict[str, Any]) -> Reading:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        time = torch.as_tensor(given["timestep"])
        scheduler = getattr(self._pipeline, "scheduler", None)
        return Reading(
            float(time.max()),
            time.dtype,
            given[self._names[0]],
            tuple(x for x in given.values() if isinstance(x, Tensor)),
            getattr(scheduler, "timesteps", None),
        )

    def _begins(self, now: Reading, first: Reading | None) -> Literal["run", "step", "call"]:
        """The table of the module's docstring."""
        if first is None or now.schedule is not first.schedule or now.time > first.time:
            return "run"
        alike, bare = now.shapes == first.shapes, now.schedule is None
        if now.time < first.time:
            return "step" if alike else "run"
        if alike and _equal([now.latents], [first.latents]):
            return "run" if bare and _equal(now.tensors, first.tensors) else "call"
        if bare:
            return "step" if alike and self.step > 0 else "run"
        return "step" if alike and now.repeats() else "call"

    def _steps(self, schedule: Tensor | None) -> int | None:
        """Steps of the run that begins."""
        if self._given_steps is not None or schedule is None:
            return self._given_steps
        # Pipelines that start from a picture count how much of the schedule they use.
        used = getattr(self._pipeline, "num_timesteps", None)
        return len(schedule) if used is None else min(used, len(schedule))

    def __getstate__(self) -> dict[str, Any]:
        # For copies: their denoiser isn't that of the pipeline, and nothing has run on it yet.
        fresh: dict[str, Any] = {"_pipeline": None, "_first": None, "_next": None}
        return self.__dict__ | fresh | {"_memory": {}, "kept": {}}


def _equal(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(some, others, strict=True))


def held_bytes(kept: Any) -> int:
    """Bytes of all tensors in nested dictionaries, lists and tuples."""
    if isinstance(kept, Tensor):
        return kept.nbytes
    if isinstance(kept, dict):
        kept = list(kept.values())
    return sum(held_bytes(part) for part in kept) if isinstance(kept, (list, tuple)) else 0
