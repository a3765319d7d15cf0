"""Schedules of reuse: which steps of a run reuse what an earlier one computed, and how to find one.

A schedule is a row of bits gamma, one for each step, 1 where the step reuses. HURRY and PHAST are
those of "Fast Sampling Through The Reuse Of Attention Maps In Diffusion Models", arXiv 2401.01008;
their formulas and the search's rule couldn't be reached and are chosen here: HURRY reuses in the
last k steps, PHAST starts there and makes the best swap of one reusing and one computing step as
long as that brings the result closer to the full run's.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.utils import tqdm

from pared.errors import InputError

Bits = tuple[int, ...]
Score = Callable[[Bits], float]
Way = Literal["swaps", "adjacent", "greedy", "exhaustive"]

# Of a swap search; it ends long before.
ROUNDS = 30


# Schedules ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReuseSchedule:
    """A schedule, and where it came from.

    Attributes:
        bits: gamma, one for each call of the denoiser, 1 = reuse; the first is 0.
        model: that it was searched for.
        sampler: class of the scheduler, likewise.
        curve: PSNR in dB of the schedules that the search accepted, in order; HURRY's first.
        complete: whether the search came to its end.
    """

    bits: Bits
    model: str = ""
    sampler: str = ""
    curve: tuple[float, ...] = ()
    complete: bool = True

    def __post_init__(self) -> None:
        if not self.bits or set(self.bits) - {0, 1}:
            raise InputError(f"bits {self.bits} are no schedule; give a 0 or 1 for each step.")
        if self.bits[0]:
            raise InputError("the first step has nothing to reuse; let the schedule begin with 0.")

    @property
    def steps(self) -> int:
        """N."""
        return len(self.bits)

    @property
    def count(self) -> int:
        """k, steps that reuse."""
        return sum(self.bits)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and text, ready for JSON."""
        return {
            "bits": "".join(map(str, self.bits)),
            "steps": self.steps,
            "count": self.count,
            "model": self.model,
            "sampler": self.sampler,
            "psnr": [round(value, 3) for value in self.curve],
            "complete": self.complete,
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, beside and renamed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.part")
        beside.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        beside.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "ReuseSchedule":
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file, or it's no schedule.
        """
        try:
            found = json.loads(Path(path).read_text())
            bits, curve = tuple(map(int, found["bits"])), tuple(map(float, found["psnr"]))
            return cls(bits, found["model"], found["sampler"], curve, found["complete"])
        except OSError:
            raise InputError(
                f"there is no schedule {str(path)!r}; give a file that `pared search` wrote, "
                "hurry, alternate, or the steps that reuse."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is no schedule as `pared search` writes it.") from None


def hurry(steps: int, count: int) -> Bits:
    """HURRY: the last `count` steps reuse.

    Raises:
        InputError: no step is left to compute.
    """
    if not 0 <= count < steps:
        raise InputError(
            f"{count} of {steps} steps can't reuse: the first computes; give a count from 0 to "
            f"{steps - 1}."
        )
    return (0,) * (steps - count) + (1,) * count


def alternate(steps: int, count: int) -> Bits:
    """The last 2 `count` steps compute and reuse in turn.

    Raises:
        InputError: there aren't so many steps.
    """
    if not 0 <= 2 * count <= steps:
        raise InputError(
            f"{count} of {steps} steps can't reuse every second time; give a count from 0 to "
            f"{steps // 2}."
        )
    return (0,) * (steps - 2 * count) + (0, 1) * count


def with_reuse(steps: int, indices: Sequence[int]) -> Bits:
    """The schedule that reuses at some steps, counted from 0."""
    return tuple(int(step in indices) for step in range(steps))


# Search -------------------------------------------------------------------------------------------


def swaps(bits: Bits, adjacent: bool = False) -> Iterator[Bits]:
    """All schedules that exchange one reusing and one computing step; the first keeps computing.

    Args:
        bits: where to start: k (N - 1 - k) schedules are one swap away.
        adjacent: exchange neighbouring steps alone.
    """
    reusing = [i for i, bit in enumerate(bits) if bit]
    computing = [i for i, bit in enumerate(bits) if not bit and i > 0]
    for i in reusing:
        for j in computing:
            if not adjacent or abs(i - j) == 1:
                yield with_reuse(len(bits), [*(r for r in reusing if r != i), j])


def swap_search(
    start: Bits, score: Score, rounds: int = ROUNDS, adjacent: bool = False
) -> Iterator[Bits]:
    """PHAST: from `start`, the best swap of each round, as long as it scores higher."""
    best = start
    yield best
    for _ in range(rounds):
        candidate = max(swaps(best, adjacent), key=score, default=best)
        if score(candidate) <= score(best):
            return
        best = candidate
        yield best


def greedy(steps: int, count: int, score: Score) -> Iterator[Bits]:
    """Add the least harmful reuse again and again: a nested family, for every k up to `count`."""
    reusing: list[int] = []
    yield with_reuse(steps, reusing)
    for _ in range(count):
        more = [[*reusing, i] for i in range(1, steps) if i not in reusing]
        reusing = max(more, key=lambda indices: score(with_reuse(steps, indices)))
        yield with_reuse(steps, reusing)


def exhaustive(steps: int, count: int, score: Score) -> list[Bits]:
    """All C(N - 1, k) schedules, the best first."""
    every = (with_reuse(steps, indices) for indices in combinations(range(1, steps), count))
    return sorted(every, key=score, reverse=True)


def search(
    score: Score,
    steps: int,
    count: int,
    way: Way = "swaps",
    log: "Log | None" = None,
    model: str = "",
    sampler: str = "",
) -> ReuseSchedule:
    """Find the steps at which reuse harms least.

    Args:
        score: how good a schedule is, higher is better; e.g. `Runs`.
        steps: N, calls of the denoiser in a run.
        count: k, of them that reuse.
        way: "swaps" is PHAST; "adjacent" swaps neighbouring steps alone; "greedy" adds the least
            harmful step, one at a time; "exhaustive" tries all.
        log: remembers scores, so that a search that was stopped goes on.
        model: that is searched for, to stand in the schedule.
        sampler: likewise.

    Returns:
        The best schedule tried, never below HURRY; after Ctrl-C, the best until then.

    Raises:
        InputError: k isn't below N.
        KeyboardInterrupt: stopped before HURRY had a score.
    """
    start = hurry(steps, count)
    accepted = [start]
    total = {
        "exhaustive": math.comb(steps - 1, count),
        "greedy": 1 + sum(steps - 1 - done for done in range(count)),
    }.get(way)
    with tqdm(total=total, desc="searching", unit="schedule") as bar:
        scores = Scores(score, log, bar)
        scores(start)
        try:
            for bits in _found(way, start, scores):
                accepted.append(bits)
                if total is None:  # of swaps it's known from round to round
                    bar.total = bar.n + sum(1 for _ in swaps(bits, way == "adjacent"))
        except KeyboardInterrupt:
            complete = False
        else:
            complete = True
    best = max((bits for bits in scores.known if sum(bits) == count), key=scores)
    curve: list[float] = []
    for bits in (*accepted, best):
        if sum(bits) == count and (not curve or scores(bits) > curve[-1]):
            curve.append(scores(bits))
    return ReuseSchedule(best, model, sampler, tuple(curve), complete)


def _found(way: Way, start: Bits, score: Score) -> Iterator[Bits]:
    """What a search accepts, one after the other."""
    if way == "greedy":
        return greedy(len(start), sum(start), score)
    if way == "exhaustive":
        return iter(exhaustive(len(start), sum(start), score)[:1])
    return swap_search(start, score, adjacent=way == "adjacent")


class Scores:
    """A score that is asked for once for each schedule, logged, and shown on a bar."""

    def __init__(self, score: Score, log: "Log | None", bar: Any) -> None:
        self.score, self.log, self.bar = score, log, bar
        self.known: dict[Bits, float] = {}

    def __call__(self, bits: Bits) -> float:
        if bits not in self.known:
            logged = None if self.log is None else self.log.scores.get(bits)
            self.known[bits] = self.score(bits) if logged is None else logged
            if logged is None and self.log is not None:
                self.log.add(bits, self.known[bits])
            alike = (v for b, v in self.known.items() if sum(b) == sum(bits))
            self.bar.set_postfix(best=f"{max(alike):.2f} dB")
            self.bar.update()
        return self.known[bits]


class Log:
    """Scores on disk: one JSON line for each schedule, behind one that says what they are of.

    Args:
        path: of the file; written as soon as there is a score.
        about: all that decides a score.

    Raises:
        InputError: the file is of another search, or no such log.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, json.loads(json.dumps(about))
        self.scores: dict[Bits, float] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a process that was killed leaves half a line
        try:
            about, *rows = [dict(json.loads(line)) for line in whole.splitlines()]
            self.scores = {tuple(map(int, row["bits"])): float(row["psnr"]) for row in rows}
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.path} is no log of a search; move it away, or write elsewhere."
            ) from None
        for name in self.about:
            if about.get(name) != self.about[name]:
                raise InputError(
                    f"{self.path} is the log of another search, with another {name}; move it away, "
                    "or write elsewhere."
                )
        if whole != text:
            self.path.write_text(whole)

    def add(self, bits: Bits, psnr: float) -> None:
        """Write a score down."""
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            rows = [{"bits": "".join(map(str, bits)), "psnr": psnr}]
            for row in [self.about, *rows] if new else rows:
                file.write(json.dumps(row) + "\n")
        self.scores[bits] = psnr
