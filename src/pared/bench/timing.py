"""Time and memory of calls, measured so that the figures can be trusted, or say that they can't.

Base and candidates take turns (base, a, b, base, a, b ...), so that what disturbs the machine
disturbs all of them; each candidate is compared with the base of its own round; the base is
measured once more at the end, and a verdict says what speaks against the figures.
"""

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from pared.bench import host
from pared.errors import InputError

# The base may move by this share between the first and the last third of a run.
DRIFT_LIMIT = 0.05
# Other programs may keep this share of the processors busy.
BUSY_LIMIT = 0.25


@dataclass(frozen=True)
class Timing:
    """Durations of one call, in seconds, and its speed relative to the base.

    Attributes:
        median: Median duration.
        p10: 10th percentile.
        p90: 90th percentile.
        samples: Every duration, in order; the base has one more than the candidates.
        ratio: Median over the rounds of base / candidate: above 1 is faster than the base.
        ratio_low: 10th percentile of the same.
        ratio_high: 90th percentile of the same.
    """

    median: float
    p10: float
    p90: float
    samples: tuple[float, ...]
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Verdict:
    """The conditions of a run, and what speaks against its figures.

    Attributes:
        threads: Threads that torch computes with on the CPU.
        cores: Processors that this process may use.
        busy_elsewhere: Processors that other programs kept busy meanwhile, on average.
        drift: Base duration in the last third of the run over that in the first, minus 1.
        notes: A sentence for each reason to distrust the figures; empty if none.
    """

    threads: int
    cores: int
    busy_elsewhere: float
    drift: float
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing speaks against the figures."""
        return not self.notes


class Timings(dict[str, Timing]):
    """The timing of each call by name, in the order given, and the run's `verdict`."""

    verdict: Verdict

    def __init__(self, timings: dict[str, Timing], verdict: Verdict) -> None:
        super().__init__(timings)
        self.verdict = verdict


def synchronize() -> None:
    """Waits until the accelerator, if one is in use, has done all it was asked to."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(device):  # others have been asked nothing
                torch.cuda.synchronize(device)
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def interleave(
    calls: dict[str, Callable[[], Any]],
    rounds: int = 20,
    warmup: int = 3,
    base: str = "base",
    *,
    around: dict[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    neighbours: Callable[[], host.Neighbours] = host.Neighbours,
    progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Times calls in turn: base, a, b, base, a, b ... and the base once more.

    Args:
        calls: What to time, by name.
        rounds: How often each call is timed.
        warmup: Rounds that run before and don't count.
        base: Name of the call that the others are compared with; it opens every round.
        around: For some calls, by name, what gives the context that each runs in; entering and
            leaving it isn't timed.
        clock: Gives the time in seconds.
        neighbours: Starts watching what other programs do.
        progress: Is told (calls done, calls in all), warm-up included, after each call.

    Returns:
        The timing of each call, and the verdict.
    """
    if base not in calls:
        raise InputError(
            f'the base "{base}" is not among the calls; name one of {", ".join(calls) or "none"}.'
        )
    if rounds < 1 or warmup < 0:
        raise InputError(
            f"{rounds} rounds after {warmup} of warm-up were asked for; take at least 1 and 0."
        )
    order = [base, *(name for name in calls if name != base)]
    turns = [*order * (warmup + rounds), base]
    samples: dict[str, list[float]] = {name: [] for name in calls}

    watch = neighbours()
    for done, name in enumerate(turns):
        with (around or {}).get(name, nullcontext)():
            duration = _duration(calls[name], clock)
        if done >= warmup * len(order):
            samples[name].append(duration)
        if progress:
            progress(done + 1, len(turns))
    timings = {name: summarize(samples[name], samples[base]) for name in calls}
    return Timings(timings, _verdict(samples[base], watch.cores()))


def _duration(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    synchronize()
    start = clock()
    call()
    synchronize()
    return clock() - start


def summarize(samples: Sequence[float], base: Sequence[float]) -> Timing:
    """Sums up a call's durations.

    Args:
        samples: Seconds of each round.
        base: Seconds of the base in each round; a further one at the end has no partner here.

    Returns:
        Percentiles of the durations, and of base / samples round by round.
    """
    p10, median, p90 = percentiles(samples)
    ratios = [b / max(s, 1e-12) for b, s in zip(base, samples, strict=False)]
    low, middle, high = percentiles(ratios)
    return Timing(median, p10, p90, tuple(samples), middle, low, high)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 10th, 50th and 90th percentile, linear between neighbouring values."""
    points = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
    return low, middle, high


def drift(durations: Sequence[float]) -> float:
    """How far durations moved: median of the last third over that of the first, minus 1."""
    third = max(1, len(durations) // 3)
    first, last = percentiles(durations[:third])[1], percentiles(durations[-third:])[1]
    return last / max(first, 1e-12) - 1


def _verdict(base: Sequence[float], busy_elsewhere: float) -> Verdict:
    cores, moved = host.usable_cores(), drift(base)
    notes = []
    if abs(moved) > DRIFT_LIMIT:
        notes.append(
            f"The base became {abs(moved):.0%} {'slower' if moved > 0 else 'faster'} during the "
            "run: the ratios are not to be trusted; measure again with more warm-up or rounds."
        )
    if busy_elsewhere > BUSY_LIMIT * cores:
        notes.append(
            f"The machine was busy: other programs kept {busy_elsewhere:.1f} of {cores} cores "
            "occupied; measure again when it is idle."
        )
    return Verdict(torch.get_num_threads(), cores, busy_elsewhere, moved, tuple(notes))


def peak_memory(
    call: Callable[[], Any],
    device: str | torch.device = "cpu",
    *,
    read: Callable[[], int] = host.resident_bytes,
) -> int:
    """Memory that a call needs at its peak, beyond what was held when it began.

    On CUDA exact. On the CPU the process's resident memory, looked at every millisecond: shorter
    peaks escape it, and memory that an earlier call left with the allocator may be reused
    unseen, so the first call in a fresh process tells most.

    Args:
        call: What to run, once. What it returns is held until the last look.
        device: Where it computes.
        read: Gives the bytes that this process holds.

    Returns:
        Bytes.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        return _peak_cuda(call, torch.device(device))
    with suppress(OSError, AttributeError):  # only glibc can hand freed memory back
        ctypes.CDLL(None).malloc_trim(0)
    before = read()
    with _Sampler(read) as sampler:
        result = call()
    del result
    return max(0, sampler.peak - before)


def _peak_cuda(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _Sampler:
    """A thread that keeps the largest value that a reader gives while the `with` block runs."""

    INTERVAL = 0.001

    def __init__(self, read: Callable[[], int]) -> None:
        self.peak = 0
        self._read = read
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            self.peak = max(self.peak, self._read())

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        # Here what the block made still lives, however short it was.
        self.peak = max(self.peak, self._read())
