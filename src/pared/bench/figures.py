"""The figures of a report: what each column is called, which way is better, how it is written."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pared.bench.bill_tables import memory, short


class Figure(NamedTuple):
    """A measured number, and where it lies when it was measured more than once.

    Attributes:
        value: median of durations and speeds, mean of quality figures.
        low: 10th percentile of durations and speeds; lower end of the 95 % interval of a mean.
        high: the other end.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends, if it has them."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def write(self, form: Callable[[float], str], spread: bool = True) -> str:
        """In words, with its spread in brackets where there is one."""
        text = form(self.value)
        if not spread or self.ends is None:
            return text
        low, high = map(form, self.ends)
        return text if low == high == text else f"{text} ({low} to {high})"


@dataclass(frozen=True)
class Column:
    """One kind of figure.

    Attributes:
        key: its name in JSON and CSV.
        title: its name for people, with the unit.
        form: writes a value.
        better: which way is better, if either is.
        about: one sentence for those who wonder.
        group: what it belongs with.
        short: whether it belongs in the table as text, which must stay narrow.
    """

    key: str
    title: str
    form: Callable[[float], str]
    better: Literal["higher", "lower"] | None
    about: str
    group: str
    short: bool = True


def seconds(value: float) -> str:
    """A duration with three digits and a fitting unit: "2.31 s", "48.2 ms", "910 us"."""
    if abs(value) >= 100:
        return f"{value:.0f} s"
    for limit, factor, unit in ((1, 1, "s"), (1e-3, 1e3, "ms")):
        if abs(value) >= limit:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value * 1e6)} us"


def times(value: float) -> str:
    """A ratio: "1.42x"."""
    return f"{_digits(value)}x"


def _digits(value: float) -> str:
    """About three digits, without an exponent: 0.912, 4.56, 12.3, 456."""
    if not math.isfinite(value):
        return str(value)
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{places}f}"


def _decibels(value: float) -> str:
    # Where figures of merit end, see `pared.bench.quality.PSNR_CAP`.
    return "equal" if value >= 100 else f"{value:.1f}"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _significant(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _count(value: float) -> str:
    return f"{value:g}"


def macs(value: float) -> str:
    """Multiply-adds: "26.18 TMACs"."""
    return short(value, "MACs")


TIME, COST = "Time", "Cost"
PAIRS, SETS = "Closeness to the base, picture by picture", "Pictures as a set"

COLUMNS = (
    Column("seconds", "time", seconds, "lower", "One whole call.", TIME),
    Column("ratio", "speed", times, "higher",
           "Base over this arm, round by round; above 1 is faster.", TIME),
    Column("call_seconds", "one pass", seconds, "lower", "One call of the denoiser.", TIME, False),
    Column("call_ratio", "speed of a pass", times, "higher",
           "Base over this arm, of one pass.", TIME, False),
    Column("floor", "over the floor", times, "lower",
           "One pass over the least time that this machine's own matrix rate and memory bandwidth "
           "allow.", TIME, False),
    Column("passes", "passes", _count, "lower", "Evaluations of the denoiser for one image.", COST),
    Column("macs_per_pass", "MACs per pass", macs, "lower",
           "Multiply-adds of the denoiser, on average over its passes.", COST),
    Column("macs_per_image", "MACs per image", macs, "lower",
           "Multiply-adds of the whole call, text encoder and decoder included.", COST, False),
    Column("parameters", "parameters", short, "lower", "Of the denoiser.", COST),
    Column("weight_bytes", "weights", memory, "lower", "Of the denoiser.", COST, False),
    Column("peak_bytes", "peak memory", memory, "lower",
           "Beyond what was held before the call.", COST, False),
    Column("psnr", "PSNR (dB)", _decibels, "higher", "Of the pixels.", PAIRS),
    Column("ssim", "SSIM", _three, "higher", "Of the local structure; 1 is equal.", PAIRS),
    Column("relative_mse", "relative MSE", _significant, "lower",
           "Squared error over the energy of the base's picture.", PAIRS, False),
    Column("judge_cosine", "judge cosine", _three, "higher", "Of the judge's features.", PAIRS),
    Column("sharpness", "sharpness", _three, None,
           "Energy of fine detail over the base's: below 1 is blurred, above is noisy.", PAIRS),
    Column("mmd_base", "MMD to base", _significant, "lower",
           "1000 times the unbiased MMD^2 of the judge's features.", SETS),
    Column("frechet_base", "Frechet to base", _significant, "lower",
           "Frechet distance of the judge's features.", SETS),
    Column("mmd_reference", "MMD to real", _significant, "lower",
           "1000 times the unbiased MMD^2 of the judge's features.", SETS),
    Column("frechet_reference", "Frechet to real", _significant, "lower",
           "Frechet distance of the judge's features.", SETS),
    Column("top1", "top-1", _percent, "higher",
           "How often the judge ranks the prompt first among the captions.", SETS),
    Column("top5", "top-5", _percent, "higher", "How often among the first five.", SETS),
)  # fmt: skip

BY_KEY = {column.key: column for column in COLUMNS}
