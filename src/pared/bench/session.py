"""A bench in progress: arms are checked, counted, timed and painted, and what was found is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from pared.bench import metering, selfcheck
from pared.bench.arms import Arm, rival_steps
from pared.bench.judge import Judge
from pared.bench.quality import Quality, Yardstick
from pared.bench.subjects import Sample, device_of
from pared.bench.timing import Timing, Timings, interleave, peak_memory

# Rounds that find out how long the base takes with fewer steps.
PILOT_ROUNDS = 3
# Pictures of each arm that are kept for the report.
KEPT = 24


@dataclass
class Look:
    """What one counted run of an arm shows.

    Attributes:
        count: of its multiply-adds and passes.
        peak: bytes beyond what was held before.
        output: of a bare denoiser, to see whether a method does anything.
    """

    count: metering.Count
    peak: int
    output: torch.Tensor | None


@dataclass
class Session:
    """What to measure, and what was found so far.

    Attributes:
        arms: by name, the base first; rivals are added when their steps are known.
        base: name of the base.
        rounds: how often each arm is timed.
        batch_size: pictures painted at once.
        samples: what to paint.
        failures: of each arm's own checks.
        looks: what a counted run of each arm showed.
        rivals: by arm, the name of the base with the steps that take as long.
        timings: of whole runs.
        calls: timings of single denoiser calls, where they mean something.
        qualities: of each arm that is done.
        images: of each arm that is done, uint8 (pictures, 3, height, width).
        notes: what the reader should know.
    """

    arms: dict[str, Arm]
    base: str
    rounds: int
    batch_size: int
    samples: list[Sample]
    failures: dict[str, list[str]] = field(default_factory=dict)
    looks: dict[str, Look] = field(default_factory=dict)
    rivals: dict[str, str] = field(default_factory=dict)
    timings: Timings = field(init=False)
    calls: dict[str, Timing] = field(default_factory=dict)
    qualities: dict[str, Quality] = field(default_factory=dict)
    images: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def measure(self) -> None:
        """Everything but the pictures."""
        self.check()
        self.look(list(self.arms))
        self.time()

    def check(self) -> None:
        """Runs the quick checks of every arm's methods."""
        self.failures = {n: selfcheck.failures_of(a.stack) for n, a in self.arms.items()}

    def look(self, names: Sequence[str]) -> None:
        """Runs arms once with everything counted, which warms them up too."""
        for name in _bar(names, "counting"):
            self.looks[name] = _look_at(self.arms[name], self.device)

    def time(self) -> None:
        """Times whole runs of all arms and of their rivals, then single denoiser calls."""
        healthy = {n: a for n, a in self.arms.items() if n == self.base or not self.failures[n]}
        self._find_rivals([a for a in healthy.values() if a.methods and a.name != self.base])
        timed = {n: a for n, a in self.arms.items() if n in healthy or n in self.rivals.values()}
        self.timings = _interleave(timed, self.rounds, self.base, "timing")
        # Of those with methods that work across calls, a single one would say nothing.
        plain = {n: a for n, a in timed.items() if not a.methods and a.kind != "fewer steps"}
        single = {n: a.subject.denoiser_call(self.looks[n].count) for n, a in plain.items()}
        calls = {name: call for name, call in single.items() if call is not None}
        if not calls:
            # A run is one call, and has been timed.
            self.calls = {name: self.timings[name] for name in plain}
        elif self.base in calls:
            with _progress("timing one pass") as progress:
                timings = interleave(calls, self.rounds, 1, self.base, progress=progress)
            self.calls = dict(timings)
            # Said once, if the whole runs were disturbed too.
            if self.timings.verdict.sound:
                self.notes += [f"Of single passes: {note}" for note in timings.verdict.notes]

    def _find_rivals(self, arms: Sequence[Arm]) -> None:
        """Adds, for each arm, the base with the steps that take as long."""
        base = self.arms[self.base]
        steps = base.steps or base.subject.steps or 1
        if not arms or steps < 2:
            return
        half = base.fewer(steps // 2)
        pilot = {arm.name: arm for arm in (base, half, *arms)}
        rounds = min(PILOT_ROUNDS, self.rounds)
        found = _interleave(pilot, rounds, self.base, "finding rivals", warmup=0)
        full, halved = found[base.name].median, found[half.name].median
        for arm in arms:
            fewer = rival_steps(steps, full, halved, found[arm.name].median)
            if fewer == steps:
                continue  # it saves less than a step: the base itself is the rival
            rival = base.fewer(fewer)
            if rival.name in self.arms and self.arms[rival.name].kind != "fewer steps":
                rival = replace(rival, name=f"{rival.name} (rival)")
            self.rivals[arm.name] = rival.name
            self.arms[rival.name] = rival
            self.failures[rival.name] = []
        self.look(list(dict.fromkeys(self.rivals.values())))

    def paint(
        self, judge: Judge | None, real: torch.Tensor | None, captions: Sequence[str] | None
    ) -> None:
        """Paints every picture with every arm and compares it with the base's."""
        base = self._painted(self.arms[self.base])
        texts, targets = _captions(self.samples, captions)
        yardstick = Yardstick(base, judge, real, texts, targets, self.notes)
        self._keep(self.base, base, yardstick.measure(base, is_base=True))
        others = [name for name in self.order() if name != self.base]
        for name in others:
            try:
                painted = self._painted(self.arms[name])
                self._keep(name, painted, yardstick.measure(painted))
            except KeyboardInterrupt:
                if len(self.qualities) < 2:
                    raise
                left = [other for other in others if other not in self.qualities]
                self.notes.append(f"Stopped by Ctrl-C before these were done: {', '.join(left)}.")
                return
        self._check_base(base)

    def _keep(self, name: str, painted: torch.Tensor, quality: Quality) -> None:
        self.images[name] = (painted[:KEPT] * 255).round().to(torch.uint8)
        self.qualities[name] = quality

    def _check_base(self, before: torch.Tensor) -> None:
        """Says so if the base no longer paints what it painted at first."""
        arm, first = self.arms[self.base], self.samples[: self.batch_size]
        with arm.attached():
            now = arm.subject.paint(first, arm.steps)
        if not torch.equal(now, before[: len(first)]):
            self.notes.append(
                "The base painted something else at the end than at the start: it is not "
                "deterministic here, or a method was not taken off cleanly."
            )

    def _painted(self, arm: Arm) -> torch.Tensor:
        """All pictures of an arm, (samples, 3, height, width)."""
        starts = range(0, len(self.samples), self.batch_size)
        batches = []
        for start in _bar(starts, f"painting {arm.name}"):
            # Attached anew for each batch: what a method remembers must not pass on to the next.
            with arm.attached():
                batch = self.samples[start : start + self.batch_size]
                batches.append(arm.subject.paint(batch, arm.steps))
        return torch.cat(batches)

    def order(self) -> list[str]:
        """The arms, each followed by its rival."""
        order = []
        for name in self.arms:
            order += [name] if self.arms[name].kind != "fewer steps" else []
            order += [self.rivals[name]] if name in self.rivals else []
        return list(dict.fromkeys(order))

    @property
    def device(self) -> str:
        """Where everything runs."""
        return str(device_of(self.arms[self.base].subject.model))


def _look_at(arm: Arm, device: str) -> Look:
    counts, outputs = [], []

    def counted() -> None:
        counts.append(metering.count(lambda: outputs.append(arm.run()), arm.subject.model))

    with arm.attached():
        peak = peak_memory(counted, device)
    return Look(counts[0], peak, None if arm.subject.paints else outputs[0])


def _captions(
    samples: Sequence[Sample], given: Sequence[str] | None
) -> tuple[list[str], list[int]]:
    """The texts to look among, each once, and the row of each sample's prompt."""
    prompts = [sample.prompt for sample in samples]
    if not all(isinstance(prompt, str) for prompt in prompts):
        return [], []
    texts = list(dict.fromkeys([*(given or ()), *prompts]))
    return texts, [texts.index(prompt) for prompt in prompts]


# Showing progress -------------------------------------------------------------------------------


def _bar(items: Any, what: str) -> Any:
    return tqdm(items, desc=what, leave=False, name="pared.bench")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for `interleave`: gives the function that it is to call."""
    with tqdm(desc=what, leave=False, name="pared.bench") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _interleave(
    arms: Mapping[str, Arm], rounds: int, base: str, what: str, warmup: int = 1
) -> Timings:
    calls = {name: arm.run for name, arm in arms.items()}
    around = {name: arm.attached for name, arm in arms.items()}
    with _progress(what) as progress:
        return interleave(calls, rounds, warmup, base, around=around, progress=progress)
