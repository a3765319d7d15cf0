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
| with a timestep of another schedule, after entries of this one | run                           |
| at a lower timestep                                            | step                          |
| with the same entry of `scheduler.timesteps`                   | call                          |
| with another entry that is the same number (Heun, PNDM)        | step                          |
| at the same timestep, with the same latents                    | call                          |
| at the same timestep, with other latents: does the schedule    | step                          |
| repeat timesteps?                                              |                               |
| if not, or with other shapes (skip-layer guidance)             | call                          |

The schedule is that of the pipeline that the method was attached to, and it counts as long as it
is the one that runs. Where a pipeline hands on the entries of `scheduler.timesteps`, they are known
as such; where it calculates with them first, what it tells must fit the entries one after the
other. So the steps of a run are the entries from its first timestep on, also where another pipeline
uses the same scheduler and begins later (image-to-image, made by `from_pipe`). Stable Diffusion
XL's `denoising_end` is taken off where the method's own pipeline was told it last.

A bare denoiser has no schedule to ask, nor has one that a pipeline with another scheduler calls:
then nobody knows how many steps there are. There other shapes begin a run, at the same timestep a
mere repetition of the first call does, and so do other latents in a run's first step, which Heun
doesn't repeat; later on they begin a step. Two things can't be told without a schedule: a run that
begins below the timestep where another broke off (between two calls), and guidance in turn on
*different* latents from a scheduler of second order. Apply the method to the pipeline where that
matters, or apply it anew for each run. A method on a pipeline takes its schedule at its word, so
whoever calls that pipeline's denoiser by hand, at one timestep all the time, makes calls of one
step, each with a memory of its own.

Wan 2.2 ends its runs with a second denoiser. One run goes through both: its steps are counted on,
and what was kept of the first is dropped, since the second has other weights.

What a method keeps is kept for each call of a step apart: the first, the second and so on, each for
tensors of its own shapes, so that prompt and negative prompt never mix. It begins empty in every
run, and is dropped

- behind the last step, where the number of steps is known;
- when a step had no such call (guidance that pauses, or a batch that shrinks when guidance ends):
  it would be older than the method believes;
- when such a call comes with other settings than in the step before, with other prompts or
  whatever else says what to paint, were it only in another order, or with other adapters of peft,
  or these at another scale.

A call that finds nothing kept must compute everything; then a second run equals one in a fresh
process. Where two pipelines share a denoiser, what is applied to one works in both, and each run of
either begins afresh, since it begins at a high timestep. Threads that call one denoiser at the same
time have hands and memories of their own, and count into the same `stats`. `pared.keeping` says
where what is kept lies.

A method decides once for each call, in `on_call`, outside of what torch.compile compiles; the sites
read the decision from `plan`. So a compiled model has one graph for every plan, not for every step.
Blocks that are compiled one by one don't share theirs any more, since each has sites of its own:
raise `torch._dynamo.config.recompile_limit` (8) to blocks x plans, or torch stops compiling there,
with a warning.

One method of a model may compute only parts of a call, some patches, say (`leads`). It tells the
clocks of the other methods, ahead of their own decisions, what of a call is theirs (`leaves`): all
of it; a new beginning, because it needs everything computed; or nothing, because the tensors that
come by have other tokens than those kept. At such a call the others find nothing kept, and what
they keep is gone behind it.

What would make a method lie is refused: a cache of diffusers or cache-dit on the same model, and a
part of the model, or an attention's processor that the method put there, that was replaced since.

A deep copy of a model carries its run-time methods along, with a clock of its own that starts
afresh and belongs to no pipeline. The handle takes them off the original alone.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy.base import Site, part_of
from pared.detours import Around, Detour, detour
from pared.errors import InputError
from pared.keeping import Store, at_work, bytes_apart
from pared.method import Stage, denoiser, denoisers
from pared.reading import Reading, Schedule, Shapes, equal, read

__all__ = ["Around", "Clock", "Detour", "Leaves", "detour"]

# What a method leaves to the others of a call: what they kept and keep; what they keep; nothing.
Leaves = Literal["all", "fresh", "nothing"]


@dataclass
class Context:
    """What is kept for one of a step's calls, from step to step.

    Attributes:
        reading: of the last such call.
        step: of that call.
        kept: what the method keeps.
    """

    reading: Reading
    step: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Hands:
    """Where the run of one thread is."""

    steps: int | None
    model: nn.Module | None = None  # that the running call is one of
    timesteps: Tensor | None = None  # of the pipeline's scheduler, whoever runs
    schedule: Schedule | None = None  # the same, where it is what runs
    place: int = 0  # of the running step in it
    step: int = 0
    call: int = 0
    plan: Any = None
    kept: dict[Any, Any] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    passing: dict[Any, Any] = field(default_factory=dict)
    leaves: Leaves = "all"
    left: Leaves = "all"  # by another method
    memory: dict[tuple[int, Shapes], Context] = field(default_factory=dict)
    before: Reading | None = None  # the first call of the step that ran up to this call
    first: Reading | None = None  # of the running step; None within a call
    next: Reading | None = None  # the same, as soon as the running call has succeeded

    def let_go(self) -> None:
        """Begin a call; one that fails, be it in another method's part, leaves it so."""
        self.before, self.first = self.first, None
        self.done, self.passing = {}, {}


class Clock:
    """Tells a method the time of a run, and keeps what it reuses.

    Args:
        target: a pipeline, or a bare denoiser; of a pipeline with two, a stage for each.
        undo: gets what stops the clock.
        steps: of a run, for a bare denoiser; a pipeline knows its own, unless told otherwise.
        leads: whether the method computes parts of a call, and sets `leaves`; one of a model can.

    Attributes:
        on_call: called before each call of the denoiser, when the clock shows its time; what it
            returns is the `plan` of the call.
        on_end: called behind each call that has succeeded, when `done` says what its sites did.
        stats: "runs" and "calls" so far, and "bytes", the most that was kept on the device at a
            time, by all threads together; with offloading also "offloaded", the most that was
            kept in main memory. Methods add what they count.

    Raises:
        InputError: the denoiser takes no timestep, or has a cache of another library already; or
            the pipeline has two denoisers.
    """

    def __init__(
        self, target: Any, undo: ExitStack, steps: int | None = None, leads: bool = False
    ) -> None:
        if len(denoisers(target)) > 1:
            raise InputError(
                f"this {type(target).__name__} has two denoisers; pared.apply attaches a method to "
                "both, its attach to one alone."
            )
        model = anatomy.unwrap(denoiser(target))
        # The class's own forward: offloading puts one without names over it.
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        if "timestep" not in self._names:
            raise InputError(
                f"{type(model).__name__} takes no timestep, so its calls can't be ordered into "
                "steps; run-time methods work on the denoisers of diffusion models."
            )
        self._model, self._parts = model, dict(_parts(model))
        self._processors: dict[str, Any] = {}
        self._require_untouched()
        self._pipeline = None if target is denoiser(target) else target
        self._rising = getattr(anatomy.of(model), "rising", False)
        self._known: Schedule | None = None
        self._given_steps = steps
        self.on_call: Callable[[], Any] | None = None
        self.on_end: Callable[[], None] | None = None
        self.stats: dict[str, Any] = {"runs": 0, "calls": 0, "bytes": 0}
        self._keeping = at_work()
        if self._keeping is not None and self._keeping.offload:
            self.stats["offloaded"] = 0
        self._start()
        if isinstance(target, Stage):
            self._join(target)
        if leads:
            cast(Any, model).pared_leader = self
            undo.callback(delattr, model, "pared_leader")
        # The others decide by what the leader leaves them, whichever was attached first.
        begin = model.register_forward_pre_hook(self._begin, prepend=leads, with_kwargs=True)
        undo.callback(begin.remove)
        undo.callback(model.register_forward_hook(self._end).remove)

    def _start(self) -> None:
        """Begin without a run."""
        self._threads, self._lock = threading.local(), threading.Lock()
        self._heard = threading.local()
        self._held: WeakKeyDictionary[Hands, tuple[int, int]] = WeakKeyDictionary()

    def _join(self, stage: Stage) -> None:
        """Go on with the runs of the clock on the pipeline's first denoiser, where this isn't it.

        A method has one clock on each.
        """
        first = stage.clocks[0] if stage.clocks else self
        stage.clocks.append(self)
        self._threads, self._lock, self._held = first._threads, first._lock, first._held
        self.stats = first.stats

    def put(self, site: Site, processor: Any, undo: ExitStack) -> None:
        """Put a processor into an attention, and refuse runs that find another there.

        Args:
            site: the attention.
            processor: of the method.
            undo: gets what puts the one from before back, where ours is still there to be taken.
        """
        attn = cast(Any, site.module)
        own = attn.processor

        def restore() -> None:
            if attn.processor is processor:
                attn.set_processor(own)

        undo.callback(restore)
        attn.set_processor(processor)
        self._processors[site.path] = processor

    @property
    def _hands(self) -> Hands:
        if not hasattr(self._threads, "hands"):
            self._threads.hands = Hands(self._given_steps)
        return self._threads.hands

    @property
    def step(self) -> int:
        """Number of the running step, from 0."""
        return self._hands.step

    @property
    def call(self) -> int:
        """Number of the running call within its step, from 0."""
        return self._hands.call

    @property
    def steps(self) -> int | None:
        """Steps of the run, or None where nobody knows."""
        return self._hands.steps

    @property
    def order(self) -> int:
        """Rounds that the scheduler makes of what its users call a step: 2 of second order (Heun).

        Of which kind a round is goes round and round: predictor, corrector, predictor, ... A bare
        denoiser's are all alike, and so are those of a schedule that isn't the pipeline's.
        """
        if self._hands.schedule is None:
            return 1
        return getattr(self._pipeline.scheduler, "order", 1)

    @property
    def reading(self) -> Reading:
        """What was read from the first call of the running step."""
        return cast(Reading, self._hands.next)

    @property
    def plan(self) -> Any:
        """What `on_call` decided for the running call."""
        return self._hands.plan

    @plan.setter
    def plan(self, plan: Any) -> None:
        self._hands.plan = plan

    @property
    def leaves(self) -> Leaves:
        """What of the running call is left to other methods; set in `on_call` by one that leads."""
        return self._hands.leaves

    @leaves.setter
    def leaves(self, leaves: Leaves) -> None:
        self._hands.leaves = leaves

    @property
    def kept(self) -> dict[Any, Any]:
        """What the method kept for this call of a step, under keys of its own choice.

        Empty in the run's first step. Tensors in it, in tuples, lists or dictionaries too, are
        counted. Where `pared.apply` was told how to keep, it is a `pared.keeping.Store`: change
        what you get from it, and you must put it back.
        """
        return self._hands.kept

    @property
    def passing(self) -> dict[Any, Any]:
        """What one part of the running call tells another; gone behind it, and never put away."""
        return self._hands.passing

    @property
    def done(self) -> dict[str, str]:
        """What the sites did at the running call: "computed", "reused" or "forecast", by path.

        A site writes it where it runs, be that within what torch.compile compiles, and it is
        counted in `stats` when the call has succeeded. So a site isn't counted at calls that never
        come to it, since another method passed by the block that it is in.
        """
        return self._hands.done

    def _count(self, done: dict[str, str]) -> None:
        """Count what the sites did at a call in `stats`, all together and by site."""
        with self._lock:
            by_site = self.stats.setdefault("by_site", {})
            for site, what in done.items():
                counts = by_site.setdefault(site, {})
                counts[what] = counts.get(what, 0) + 1
                self.stats[what] = self.stats.get(what, 0) + 1

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The hook before a call: move the hands."""
        hands, schedule = self._hands, self._schedule()
        now, first = self._reading(args, kwargs), hands.before
        begins = self._begins(now, first, schedule)
        hands.next = first if begins == "call" else now
        if begins == "run" or hands.model is not self._model:
            self._require_untouched()
            hands.memory, hands.model = {}, self._model
        if begins == "run":
            hands.step, hands.call = 0, 0
            self._enter(now, schedule)
        elif begins == "step":
            hands.memory = {k: c for k, c in hands.memory.items() if c.step == hands.step}
            hands.step, hands.call = hands.step + 1, 0
            self._advance(now)
        else:
            hands.call += 1
        with self._lock:
            self.stats["runs"] += begins == "run"
            self.stats["calls"] += 1
        leader = getattr(self._model, "pared_leader", self)
        hands.left = "all" if leader is self else leader.leaves
        context = hands.memory.get((hands.call, now.shapes))
        if context is None or hands.left != "all" or not now.continues(context.reading):
            context = Context(now, kept={} if self._keeping is None else Store(self._keeping))
        context.reading, context.step = now, hands.step
        hands.memory[hands.call, now.shapes], hands.kept = context, context.kept
        if self.on_call is not None:
            hands.plan = self.on_call()

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The hook behind a call that has succeeded."""
        hands = self._hands
        hands.first, hands.passing = hands.next, {}
        self._count(hands.done)
        if self.on_end is not None:
            self.on_end()
        self._weigh(hands)
        over = hands.steps is not None and hands.step == hands.steps - 1
        if over or hands.left == "nothing":
            hands.kept.clear()
            self._weigh(hands)

    def _weigh(self, hands: Hands) -> None:
        """Note what this thread keeps now, and the most that all keep."""
        held = bytes_apart([context.kept for context in hands.memory.values()])
        with self._lock:
            self._held[hands] = held
            here, away = (sum(parts) for parts in zip(*self._held.values(), strict=True))
            self.stats["bytes"] = max(self.stats["bytes"], here)
            if "offloaded" in self.stats:
                self.stats["offloaded"] = max(self.stats["offloaded"], away)

    def _clocks(self) -> list["Clock"]:
        """All on this denoiser, in the order in which they hear of a call."""
        hooks = self._model._forward_pre_hooks.values()
        heard = (getattr(hook, "__self__", None) for hook in hooks)
        return [each for each in heard if isinstance(each, Clock)]

    def _reading(self, args: tuple, kwargs: dict[str, Any]) -> Reading:
        """Of the running call; the first clock that hears of it reads for all."""
        clocks = self._clocks()
        if clocks[0] is self:
            for clock in clocks:
                clock._hands.let_go()
            given = dict(zip(self._names, args, strict=False)) | kwargs
            schedules = (clock._schedule() for clock in clocks)
            known = [schedule for schedule in schedules if schedule is not None]
            self._heard.reading = read(self._model, self._names[0], given, known, self._rising)
        return clocks[0]._heard.reading

    def _schedule(self) -> Schedule | None:
        """What the pipeline's scheduler was last set to, whether that is what runs or not."""
        timesteps = getattr(getattr(self._pipeline, "scheduler", None), "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or not len(timesteps):
            return None
        known = self._known
        if known is None or known.timesteps is not timesteps:
            known = self._known = Schedule(timesteps, cast(Any, anatomy.of(self._model)))
        return known

    def _require_untouched(self) -> None:
        """Refuse a model where what a method does would no longer be what it counts."""
        name = type(self._model).__name__
        others = {"diffusers": "is_cache_enabled", "cache-dit": "_is_cached"}
        for library, sign in others.items():
            if getattr(self._model, sign, False):
                raise InputError(
                    f"this {name} has a cache of {library} enabled, and two caches would each "
                    f"reuse what the other left; take it off by {library}'s disable_cache first."
                )
        for path, module in self._parts.items():
            if part_of(self._model, path) is not module:
                raise InputError(
                    f"{path} of this {name} was replaced since a run-time method was attached to "
                    "it (an adapter came or went, say); take the method off and attach it again."
                )
        for path, processor in self._processors.items():
            if (now := cast(Any, self._parts[path]).processor) is not processor:
                raise InputError(
                    f"the attention processor of {path} of this {name} was replaced since by a "
                    f"{type(now).__name__} (attention slicing or an IP-Adapter, say), and the "
                    "run-time method does nothing there any more; take the method off and attach "
                    "it again, on other attentions where that is to stay."
                )

    def _begins(
        self, now: Reading, first: Reading | None, known: Schedule | None
    ) -> Literal["run", "step", "call"]:
        """The table of the module's docstring."""
        hands = self._hands
        if first is None or now.time > first.time:
            return "run"
        if hands.timesteps is not (None if known is None else known.timesteps):
            return "run"
        alike, schedule = now.shapes == first.shapes, hands.schedule
        if schedule is not None and (before := schedule.place(first.timestep)) is not None:
            if schedule.rivals(now.timestep):
                return "run"
            place = schedule.place(now.timestep)
            if place is not None and now.time == first.time:
                return "call" if place == before else "step"
        if now.time < first.time:
            return "run" if schedule is None and not alike else "step"
        if alike and equal([now.latents], [first.latents]):
            return "run" if schedule is None and now.repeats(first) else "call"
        if schedule is None:
            return "step" if alike and hands.step > 0 else "run"
        return "step" if alike and schedule.repeats(now.rounding) else "call"

    def _enter(self, now: Reading, known: Schedule | None) -> None:
        """Find out where in the schedule a run begins, and whether it's the one that runs."""
        hands, place = self._hands, None
        hands.timesteps = None if known is None else known.timesteps
        if known is not None:
            place = known.place(now.timestep)
            scheduler = self._pipeline.scheduler
            # A scheduler that nobody has set shows all timesteps of its training.
            was_set = getattr(scheduler, "num_inference_steps", None) is not None
            if place is None and was_set and not known.rivals(now.timestep):
                likely = getattr(scheduler, "begin_index", None)
                place = known.nearest(now.time, now.rounding, likely)
        hands.schedule, hands.place = (None, 0) if place is None else (known, place)
        hands.steps = self._steps(hands)

    def _advance(self, now: Reading) -> None:
        """Follow the schedule to the entry of a new step; one that it doesn't have isn't its."""
        hands, schedule = self._hands, self._hands.schedule
        if schedule is None:
            return
        place = schedule.place(now.timestep)
        if place is None and schedule.fits(hands.place + 1, now.time, now.rounding):
            place = hands.place + 1
        if place is None:
            hands.schedule, hands.steps = None, self._given_steps
        else:
            hands.place = place

    def _steps(self, hands: Hands) -> int | None:
        """Steps of the run that begins."""
        if self._given_steps is not None or hands.schedule is None:
            return self._given_steps
        left = len(hands.schedule) - hands.place
        if getattr(self._pipeline, "denoising_end", None):
            return min(left, self._pipeline.num_timesteps)
        return left

    def __getstate__(self) -> dict[str, Any]:
        # For copies: their denoiser isn't that of the pipeline, and nothing has run on it yet.
        of_run = ("_threads", "_lock", "_heard", "_held")
        own = {name: value for name, value in vars(self).items() if name not in of_run}
        return own | {"_pipeline": None, "_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What methods go around, by its dotted path."""
    family = anatomy.of(model)
    paths = [block.path for block in family.blocks] + [site.path for site in family.sites()]
    paths += [path for branch in family.branches for path in (branch.path, *branch.feeds)]
    yield from ((path, model.get_submodule(path)) for path in paths)
