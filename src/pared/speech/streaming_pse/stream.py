"""Enhancing while it is being recorded: samples in, samples out, and how long each hop took."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pared.errors import InputError
from pared.speech.streaming_pse.layers import Enrolment
from pared.speech.streaming_pse.method import SAMPLE_RATE
from pared.speech.streaming_pse.model import State, StreamingPSEModel

Step = Callable[[Tensor, State, Enrolment], tuple[Tensor, State]]

# Hops that are enhanced and forgotten before the first: libraries prepare themselves at first use.
WARM_UP = 3


class Stream:
    """Takes one recording in pieces of any size and gives it back enhanced.

    What comes out, piece by piece, is what `StreamingPSEModel.enhance` makes of the whole, and as
    long. The model must not be trained meanwhile. Memory stays the same however long it runs.

    Args:
        model: the enhancer.
        enrolment: of one user, as `pared.speech.streaming_pse.enrolment` makes or loads it.
        step: what enhances a hop, where it isn't the model itself: `pared.export.onnx.OnnxStep`.

    Attributes:
        latency: how long each hop took.
    """

    def __init__(
        self, model: StreamingPSEModel, enrolment: Enrolment, step: Step | None = None
    ) -> None:
        self.model, self.enrolment = model.eval(), enrolment
        self.step = step or model.step_
        self.hop = model.settings.hop
        # Samples that the output is behind the input.
        self.lag = (1 + model.settings.lookahead) * self.hop
        self.latency = Latency(self.hop / SAMPLE_RATE)
        for _ in range(WARM_UP):
            self._begin()
            self._enhance(torch.zeros_like(self.state.tail))
        self._begin()

    def _begin(self) -> None:
        self.state = self.model.state()
        self.taken = self.given = 0
        # The first hops of output lie before the recording.
        self.early = self.lag
        self.pending = torch.empty(0)

    def __call__(self, samples: Tensor) -> Tensor:
        """What can be given out after these samples.

        Args:
            samples: float in [-1, 1], (samples,), at 16 kHz; any number.

        Returns:
            (samples',): behind what came in by the latency at most, and empty at first.

        Raises:
            InputError: another shape, or a sample that is no number; the stream is as it was.
        """
        check_samples(samples, self.taken)
        self.taken += len(samples)
        waiting = torch.cat([self.pending, samples.detach().float().cpu()])
        whole = len(waiting) // self.hop * self.hop
        # A copy, or a view would hold on to all that came.
        self.pending = waiting[whole:].clone()
        return self._enhanced(waiting[:whole])

    def flush(self) -> Tensor:
        """The rest, (samples,), once nothing more comes; then the stream can begin again."""
        missing = self.taken - self.given
        silence = torch.zeros(-len(self.pending) % self.hop + self.lag)
        rest = self._enhanced(torch.cat([self.pending, silence]))[:missing]
        self._begin()
        return rest

    def _enhanced(self, samples: Tensor) -> Tensor:
        """Whole hops in, whole hops out."""
        done = [self._timed(chunk) for chunk in samples.view(-1, 1, self.hop).to(self.model.device)]
        out = torch.cat(done).flatten() if done else samples
        skipped = min(self.early, len(out))
        self.early -= skipped
        self.given += len(out) - skipped
        return out[skipped:]

    def _timed(self, chunk: Tensor) -> Tensor:
        begun = time.perf_counter()
        hop = self._enhance(chunk)
        self.latency.add(time.perf_counter() - begun)
        return hop

    @torch.inference_mode()
    def _enhance(self, chunk: Tensor) -> Tensor:
        hop, self.state = self.step(chunk, self.state, self.enrolment)
        return hop.cpu()


def check_samples(samples: Tensor, before: int = 0) -> None:
    """Refuse what is no piece of a recording; `before` is how many samples came before it.

    Raises:
        InputError: another shape, integers, or a sample that is no number.
    """
    if samples.ndim != 1 or not samples.is_floating_point():
        raise InputError(
            f"the samples are {samples.dtype} of shape {tuple(samples.shape)}; give floating-point "
            "numbers in [-1, 1] of shape (samples,)."
        )
    if not (finite := samples.isfinite()).all():
        number = before + int((~finite).nonzero()[0])
        raise InputError(
            f"sample {number} ({number / SAMPLE_RATE:.3f} s) is NaN or infinite; a recording is "
            "made of numbers in [-1, 1]."
        )


@dataclass(frozen=True)
class Report:
    """How fast a stream ran.

    Attributes:
        hops: how many there were.
        hop: seconds that one lasts.
        median: seconds that one took, for half of them at most.
        p99: for 99 of 100 at most.
        worst: the longest.
        late: hops that took longer than they last.
        real_time_factor: time taken over time lasted.
    """

    hops: int
    hop: float
    median: float
    p99: float
    worst: float
    late: int
    real_time_factor: float


class Latency:
    """Counts durations in classes 2% wide, so that an hour of them takes no more memory than one.

    Args:
        hop: seconds that a hop lasts.
    """

    SHORTEST, LONGEST, GROWTH = 1e-6, 10.0, 1.02

    def __init__(self, hop: float) -> None:
        self.hop = hop
        self.counts = [0] * (1 + self._class(self.LONGEST))
        self.total = self.worst = 0.0
        self.late = 0

    def _class(self, seconds: float) -> int:
        within = min(max(seconds, self.SHORTEST), self.LONGEST)
        return int(math.log(within / self.SHORTEST) / math.log(self.GROWTH))

    def add(self, seconds: float) -> None:
        """Count one hop."""
        self.counts[self._class(seconds)] += 1
        self.total += seconds
        self.worst = max(self.worst, seconds)
        self.late += seconds > self.hop

    def quantile(self, share: float) -> float:
        """Seconds that a `share` of the hops took at most, to 2%; 0 where there was none."""
        wanted, seen = share * sum(self.counts), 0
        for number, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return min(self.worst, self.SHORTEST * self.GROWTH ** (number + 1))
        return 0.0

    def report(self) -> Report:
        """All of it."""
        hops = sum(self.counts)
        factor = self.total / (hops * self.hop) if hops else 0.0
        return Report(
            hops, self.hop, self.quantile(0.5), self.quantile(0.99), self.worst, self.late, factor
        )
