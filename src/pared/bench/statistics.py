"""How sure a figure is: spread over seeds, and bootstrap intervals over samples."""

from typing import NamedTuple

import torch

from pared.bench.checks import as_double
from pared.errors import InputError

RESAMPLES = 2000


class Interval(NamedTuple):
    """Where a mean lies, at some level of confidence."""

    low: float
    high: float


class Spread(NamedTuple):
    """Mean, standard deviation (over n - 1) and standard error of the mean; NaN for one value."""

    mean: float
    std: float
    standard_error: float


class Difference(NamedTuple):
    """The mean of paired differences, and its interval."""

    mean: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.low <= 0 <= self.high


def spread(values: torch.Tensor) -> Spread:
    """Sums up figures that should agree, such as those of several seeds.

    Args:
        values: Figures (n,).

    Returns:
        Mean, standard deviation and standard error, in the unit of the values.
    """
    values = _figures(values)
    n = len(values)
    std = values.std().item() if n > 1 else float("nan")
    return Spread(values.mean().item(), std, std / n**0.5)


def bootstrap_interval(
    values: torch.Tensor, generator: torch.Generator, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of the mean, over 2,000 resamples.

    Args:
        values: One figure per independent sample (n,), at least 2. Below some 20 the interval is
            too narrow.
        generator: Draws the resamples (a CPU generator).
        level: Share of such intervals that hold the true mean.

    Returns:
        The interval, in the unit of the values.
    """
    values = _figures(values)
    n = len(values)
    _check_interval(n, level)
    means = [values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(RESAMPLES)]
    return _between(torch.stack(means), level)


def ratio_interval(
    parts: torch.Tensor, wholes: torch.Tensor, generator: torch.Generator, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of sum(parts) / sum(wholes), over 2,000 resamples of pairs.

    Args:
        parts: One figure per independent sample (n,), such as an utterance's errors; at least 2.
        wholes: What each is a part of (n,), such as its words.
        generator: Draws the resamples (a CPU generator).
        level: Share of such intervals that hold the true ratio.

    Returns:
        The interval.
    """
    pairs = torch.stack([_figures(parts), _figures(wholes)])
    n = pairs.shape[1]
    _check_interval(n, level)
    sums = [pairs[:, torch.randint(n, (n,), generator=generator)].sum(1) for _ in range(RESAMPLES)]
    part, whole = torch.stack(sums).unbind(1)
    return _between(part / whole, level)


def paired_difference(
    a: torch.Tensor, b: torch.Tensor, generator: torch.Generator, level: float = 0.95
) -> Difference:
    """The mean of a - b over samples that both have, with its paired bootstrap interval.

    Args:
        a: One figure per sample (n,).
        b: The figures of the same samples (n,), in the same order.
        generator: Draws the resamples (a CPU generator).
        level: Share of such intervals that hold the true difference.

    Returns:
        Mean difference and interval, in the unit of the values.
    """
    a, b = _figures(a), _figures(b)
    if len(a) != len(b):
        raise InputError(
            f"there are {len(a)} and {len(b)} values; a paired difference needs both figures of "
            "each sample."
        )
    low, high = bootstrap_interval(a - b, generator, level)
    return Difference((a - b).mean().item(), low, high)


def _check_interval(n: int, level: float) -> None:
    if n < 2 or not 0 < level < 1:
        raise InputError(
            f"an interval at level {level} over {n} values can't be had; "
            "take at least 2 values and a level between 0 and 1."
        )


def _between(resampled: torch.Tensor, level: float) -> Interval:
    """The middle share of resampled figures."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = resampled.quantile(tails).tolist()
    return Interval(low, high)


def _figures(values: torch.Tensor) -> torch.Tensor:
    """Checked figures (n,), in float64 on the CPU."""
    if values.ndim != 1 or len(values) == 0:
        raise InputError(
            f"the values have shape {tuple(values.shape)}; they must be a list of at least one."
        )
    values = as_double(values).cpu()
    lost = (~values.isfinite()).sum().item()
    if lost:
        raise InputError(
            f"{lost} of {len(values)} values are NaN or infinite, so they have no mean; "
            "leave those samples out, and report how many they were."
        )
    return values
