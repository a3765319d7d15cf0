"""What a model computes at some steps of a run only, forecast for the steps between them.

At a computed step s_0 with value y, behind the computed steps s_1 > s_2 > ..., the factors are
finite differences of the values (TaylorSeer, arXiv 2503.06923, section 3):

    F^0 = y,    F^(i+1) = (F^i - F^i of step s_1) / d_i

and the value k steps later is forecast as

    taylor:  sum_i F^i k^i / i!                      with d_i = s_0 - s_1 for every i
    newton:  sum_i F^i prod_(j<i) (s_0 + k - s_j)    with d_i = s_0 - s_(i+1), divided differences

Both are exact where the value is linear in the step. Beyond that Taylor's isn't, since its
differences look back: a s^2 is missed by -a N k at a uniform gap N. Newton's is the polynomial
through the values themselves, exact up to the degree of its order whatever the gaps; at uniform
gaps it is sum_i binom(k / N + i - 1, i) nabla^i y.

A step may be any number that rises during a run. Where one comes twice, the later value takes the
place of the earlier, and the differences stay.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pared.nn.linear_attention import clipped

Predictor = Literal["taylor", "newton"]

# Types to store factors in, as torch names them.
Stored = Literal["float16", "bfloat16", "float32", "float64"]

# What a site computes: one tensor for each stream of tokens, None for a stream that it leaves out.
Streams = tuple[Tensor | None, ...]


class History(NamedTuple):
    """What is known of the values of one site.

    Attributes:
        steps: where it was computed, the latest first; as many as factors are kept at most.
        factors: F^0, F^1, ... of each stream, shaped like its values.
        dtypes: of the values themselves.
    """

    steps: tuple[float, ...]
    factors: tuple[tuple[Tensor, ...] | None, ...]
    dtypes: tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class Forecaster:
    """Keeps histories, and forecasts by them.

    Args:
        order: m, of the highest difference kept; with 0 the last value itself is the forecast.
        predictor: the series.
        dtype: to store factors in; None for that of the values.
    """

    order: int = 0
    predictor: Predictor = "taylor"
    dtype: Stored | None = None

    def updated(self, old: History | None, step: float, values: Streams) -> History:
        """The history with the values of a computed step; of the first, there's no `old` one."""
        if old is not None and old.steps[0] == step:
            return self._replaced(old, values)
        steps = (step, *(old.steps if old else ()))[: self.order + 1]
        past = old.factors if old else (None,) * len(values)
        spans = self._spans(steps)
        factors = tuple(
            None if value is None else self._differences(value, before or (), spans)
            for value, before in zip(values, past, strict=True)
        )
        return History(steps, factors, tuple(v if v is None else v.dtype for v in values))

    def _replaced(self, old: History, values: Streams) -> History:
        """The history with other values at its last step."""
        factors = tuple(
            None if value is None else (*self._differences(value, (), ()), *(before or ())[1:])
            for value, before in zip(values, old.factors, strict=True)
        )
        return old._replace(factors=factors)

    def forecast(self, history: History, step: float) -> Streams:
        """The values at a later step, in the types that they were computed in."""
        weights = self._weights(history.steps, step)
        return tuple(
            None if factors is None or dtype is None else _series(factors, weights, dtype)
            for factors, dtype in zip(history.factors, history.dtypes, strict=True)
        )

    def _differences(
        self, value: Tensor, past: tuple[Tensor, ...], spans: tuple[float, ...]
    ) -> tuple[Tensor, ...]:
        """F^0, F^1, ... from a value and the factors before, in float32 or finer.

        Half precision would lose them: they are small differences of large numbers. All are fresh
        tensors, since a view would hold all of what it is a view of.
        """
        stored = value.dtype if self.dtype is None else getattr(torch, self.dtype)
        found = [value.detach().to(precise(value.dtype, stored), copy=True)]
        for previous, span in zip(past, spans, strict=False):
            found.append((found[-1] - previous.to(found[-1].dtype)) / span)
        return tuple(factor.to(stored) for factor in found)

    def _spans(self, steps: tuple[float, ...]) -> tuple[float, ...]:
        """The steps d_i that each difference is divided by."""
        last = steps[1:2] * (len(steps) - 1) if self.predictor == "taylor" else steps[1:]
        return tuple(steps[0] - step for step in last)

    def _weights(self, steps: tuple[float, ...], step: float) -> tuple[float, ...]:
        """What each factor is multiplied with."""
        if self.predictor == "taylor":
            return tuple((step - steps[0]) ** i / math.factorial(i) for i in range(len(steps)))
        return tuple(math.prod(step - s for s in steps[:i]) for i in range(len(steps)))


def _series(factors: tuple[Tensor, ...], weights: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """sum_i w_i F^i; a stream that came later has fewer factors than there are weights."""
    total = factors[0].to(precise(dtype, factors[0].dtype))
    for factor, weight in zip(factors[1:], weights[1:], strict=False):
        total = total + weight * factor.to(total.dtype)
    return clipped(total, dtype)


# Residual streams ---------------------------------------------------------------------------------


def precise(*dtypes: torch.dtype) -> torch.dtype:
    """The finest of some types, float32 at least."""
    finest = torch.float32
    for dtype in dtypes:
        finest = torch.promote_types(finest, dtype)
    return finest


def changes(before: Streams, after: Streams, dtype: torch.dtype = torch.float32) -> Streams:
    """After minus before, of each stream, in `dtype` or finer; None where nothing comes out.

    Fresh tensors: what happens to the streams later leaves them alone.
    """
    return tuple(
        None if x is None or y is None else _change(x.detach(), y.detach(), precise(dtype, y.dtype))
        for x, y in zip(before, after, strict=True)
    )


def _change(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return y.to(dtype) - x.to(dtype)


def changed(before: Streams, change: Streams) -> Streams:
    """The streams with their changes added, in the streams' types; those without stay as they are.

    The inverse of `changes`.
    """
    return tuple(
        x if x is None or y is None else clipped(x.to(precise(x.dtype, y.dtype)) + y, x.dtype)
        for x, y in zip(before, change, strict=True)
    )
