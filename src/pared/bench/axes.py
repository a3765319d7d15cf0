"""Axes for plots: sizes, scales, round ticks, and the frame that shows them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True)
class Size:
    """Of a plot, in the SVG's own pixels.

    Attributes:
        width: of the whole.
        height: of the whole.
        left: room for the labels of the y axis.
        bottom: room for the labels of the x axis.
        ticks: about how many an axis has.
    """

    width: int
    height: int
    left: int = 64
    right: int = 18
    top: int = 30
    bottom: int = 50
    ticks: int = 6
    text: int = 13


WIDE = Size(560, 360)
NARROW = Size(360, 320, left=54, right=12, ticks=4, text=12)
# Of stacked bars, which take the whole page.
BROAD = Size(1100, 400)


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: with the unit.
        log: whether it is logarithmic.
        form: writes the value at a tick.
        low: where it begins; by default a little below the smallest value.
        high: where it ends.
    """

    label: str
    log: bool = False
    form: Callable[[float], str] = field(default=lambda value: f"{value:g}")
    low: float | None = None
    high: float | None = None


# Ticks --------------------------------------------------------------------------------------------


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values from `low` to `high`, both above 0, spread evenly over a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def within(factors: Sequence[float]) -> list[float]:
        values = (float(f"{each}e{power}") for power in powers for each in factors)
        return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]

    finest = within((1, 1.5, 2, 3, 4, 5, 7))
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        if len(within(factors)) <= count + 1:
            return within(factors) if len(within(factors)) > 1 else finest
    every = -(-len(within((1,))) // count)
    return within((1,))[::every]


# The frame ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """From values to pixels, along one direction.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        log: whether equal ratios, not equal differences, are equally far apart.
        start: in pixels.
        end: in pixels.
    """

    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(each) for each in (self.low, self.high, max(value, 1e-300)))
            if self.log
            else (self.low, self.high, value)
        )
        share = (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def scale_of(axis: Axis, values: Sequence[float], start: float, end: float) -> Scale:
    """A scale that holds all values, with a little room at both ends where the axis doesn't say."""
    if axis.log:
        values = [value for value in values if value > 0] or [1.0]
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    first, last = low, high
    if axis.log:
        # In ratios; at least some, since a single value has no range.
        room = max((high / low) ** 0.06, 1.04)
        first, last = low / room, high * room
    else:
        room = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
        first, last = low - room, high + room
    low, high = (first if axis.low is None else low), (last if axis.high is None else high)
    return Scale(low, high, axis.log, start, end)


@dataclass(frozen=True)
class Frame:
    """Axes with grid, ticks and labels."""

    size: Size
    x: Scale
    y: Scale
    axes: tuple[Axis, Axis]

    @classmethod
    def around(
        cls, size: Size, x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]
    ) -> "Frame":
        horizontal = scale_of(x, xs, size.left, size.width - size.right)
        vertical = scale_of(y, ys, size.height - size.bottom, size.top)
        return cls(size, horizontal, vertical, (x, y))

    def draw(self) -> str:
        size, (x, y) = self.size, self.axes
        bottom, right = size.height - size.bottom, size.width - size.right
        parts = []
        for value in _ticks(self.x, size.ticks):
            at = self.x(value)
            parts.append(f'<path class="grid" d="M{at} {size.top}V{bottom}"/>')
            parts.append(written(at, bottom + 18, x.form(value), "tick", "middle"))
        for value in _ticks(self.y, size.ticks):
            at = self.y(value)
            parts.append(f'<path class="grid" d="M{size.left} {at}H{right}"/>')
            parts.append(written(size.left - 8, at + 4, y.form(value), "tick", "end"))
        parts.append(f'<path class="axis" d="M{size.left} {bottom}H{right}"/>')
        middle = (size.left + right) / 2
        parts.append(written(middle, size.height - 8, x.label, "label", "middle"))
        # Above the axis, not along it: nobody reads sideways.
        parts.append(written(0, 14, y.label, "label", "start"))
        return "".join(parts)


def _ticks(scale: Scale, count: int) -> list[float]:
    return (log_ticks if scale.log else linear_ticks)(scale.low, scale.high, count)


def written(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    """Text of a class of the style sheet, at a place that its "start", "middle" or "end" takes."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
