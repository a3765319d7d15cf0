"""Small plots as inline SVG: lines, points, stacked bars, on linear or logarithmic axes.

Colours come from CSS classes (`s0`, `s1` ... for series), so that a page's light and dark themes
serve its plots too. Every plot is drawn twice, for wide and for narrow screens, and the style sheet
shows one of them: text that only shrinks with the picture can't be read on a phone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from pared.bench.axes import BROAD, NARROW, WIDE, Axis, Frame, Scale, Size, written

# Colours of series that the style sheet knows; further series begin again.
COLOURS = 8
# Width of an average letter, as a share of the text size.
LETTER = 0.56


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        name: for the legend.
        points: (x, y) in the order of x.
        colour: number of the series' colour.
        faint: for raw data behind a smoothed line.
        dots: whether each point is marked.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    faint: bool = False
    dots: bool = True


@dataclass(frozen=True)
class Point:
    """A labelled point, with its uncertainty.

    Attributes:
        label: beside it.
        x: where it lies.
        y: likewise.
        colour: number of the series' colour.
        hollow: drawn as a ring.
        x_range: ends of the error bar, if any.
        y_range: likewise.
        about: shown when the pointer rests on it.
    """

    label: str
    x: float
    y: float
    colour: int = 1
    hollow: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    about: str = ""


@dataclass(frozen=True)
class Bar:
    """A stacked bar: its parts by kind, in order, and what is written at its end."""

    name: str
    parts: Sequence[tuple[str, float]]
    note: str = ""


# Plots --------------------------------------------------------------------------------------------


def _both(draw: Callable[[Size], str], label: str, wide: Size, narrow: Size) -> str:
    """A plot drawn for wide and for narrow screens; the style sheet shows one."""
    return "".join(
        f'<svg class="plot {name}" viewBox="0 0 {size.width} {size.height}" role="img" '
        f'aria-label="{escape(label)}">{draw(size)}</svg>'
        for name, size in (("wide", wide), ("narrow", narrow))
    )


def line_plot(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    label: str,
    mark: tuple[float, float, str] | None = None,
) -> str:
    """Lines over common axes.

    Args:
        series: the lines; those of one colour after each other.
        x: horizontal axis.
        y: vertical axis.
        label: what the plot shows, for those who can't see it.
        mark: x, y and name of one place to point out.

    Returns:
        SVG, for wide and narrow screens.
    """
    points = [point for each in series for point in each.points]

    def draw(size: Size) -> str:
        frame = Frame.around(size, x, y, [p[0] for p in points], [p[1] for p in points])
        parts = [frame.draw()]
        if mark is not None:
            parts.append(_mark(frame, *mark))
        parts += [_line(frame, each) for each in series]
        return "".join(parts)

    return _both(draw, label, WIDE, NARROW)


def _line(frame: Frame, series: Series) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in series.points]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    faint = " faint" if series.faint else ""
    parts = [f'<g class="s{series.colour % COLOURS}{faint}"><path class="line" d="{path}"/>']
    if series.dots:
        for (px, py), (x, y) in zip(places, series.points, strict=True):
            about = f"{series.name}: {frame.axes[0].form(x)}, {frame.axes[1].form(y)}"
            parts.append(_dot(px, py, about))
    return "".join(parts) + "</g>"


def _dot(x: float, y: float, about: str, kind: str = "dot", radius: float = 4) -> str:
    title = f"<title>{escape(about)}</title>" if about else ""
    return f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}">{title}</circle>'


def _mark(frame: Frame, x: float, y: float, name: str) -> str:
    size, at = frame.size, frame.x(x)
    anchor = "end" if at > size.width * 0.6 else "start"
    beside = at - 8 if anchor == "end" else at + 8
    return (
        f'<path class="mark" d="M{at} {size.top}V{size.height - size.bottom}"/>'
        + written(beside, size.top + 14, name, "name", anchor)
        + _dot(at, frame.y(y), name, "mark-dot", 6)
    )


def scatter_plot(
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    label: str,
    best: Sequence[int] = (),
    corner: str = "",
) -> str:
    """Labelled points with error bars.

    Args:
        points: in the order in which they are drawn.
        x: horizontal axis.
        y: vertical axis.
        label: what the plot shows, for those who can't see it.
        best: numbers of the points that no other beats; a line joins them.
        corner: which corner is good, e.g. "top left", and gets an arrow.

    Returns:
        SVG, for wide and narrow screens.
    """
    xs = [value for p in points for value in (p.x, *(p.x_range or ()))]
    ys = [value for p in points for value in (p.y, *(p.y_range or ()))]

    def draw(size: Size) -> str:
        frame = Frame.around(size, x, y, xs, ys)
        places = [(frame.x(p.x), frame.y(p.y)) for p in points]
        hint, hint_box = _corner(size, corner)
        parts = [frame.draw(), hint]
        if len(best) > 1:
            joined = sorted(places[number] for number in best)
            path = "M" + "L".join(f"{px:g} {py:g}" for px, py in joined)
            parts.append(f'<path class="front" d="{path}"/>')
        parts += [_error_bars(frame, point) for point in points]
        for number, point in enumerate(points):
            parts.append(_marker(places[number], point, number in best))
        parts += _labels(size, places, points, hint_box)
        return "".join(parts)

    return _both(draw, label, WIDE, NARROW)


Box = tuple[float, float, float, float]


def _corner(size: Size, corner: str) -> tuple[str, Box]:
    """The arrow to the good corner, and the box that it fills."""
    if not corner:
        return "", (0, 0, 0, 0)
    top, left = "top" in corner, "left" in corner
    arrow = {(1, 1): "↖", (1, 0): "↗", (0, 1): "↙", (0, 0): "↘"}[top, left]
    at = size.left + 8 if left else size.width - size.right - 8
    high = size.top + 14 if top else size.height - size.bottom - 10
    words = f"{arrow} better" if left else f"better {arrow}"
    anchor = "start" if left else "end"
    box = _box((at, high, anchor), len(words) * size.text * LETTER, size.text)
    return written(at, high, words, "hint", anchor), box


def _error_bars(frame: Frame, point: Point) -> str:
    at_x, at_y = frame.x(point.x), frame.y(point.y)
    paths = []
    if point.x_range:
        paths.append(f"M{frame.x(point.x_range[0])} {at_y}H{frame.x(point.x_range[1])}")
    if point.y_range:
        paths.append(f"M{at_x} {frame.y(point.y_range[0])}V{frame.y(point.y_range[1])}")
    if not paths:
        return ""
    return f'<path class="error s{point.colour % COLOURS}" d="{"".join(paths)}"/>'


def _marker(place: tuple[float, float], point: Point, is_best: bool) -> str:
    halo = _dot(*place, "", "halo", 11) if is_best else ""
    kind = "dot hollow" if point.hollow else "dot"
    dot = _dot(*place, point.about or point.label, kind, 6)
    return f'<g class="s{point.colour % COLOURS}">{halo}{dot}</g>'


def _labels(
    size: Size, places: Sequence[tuple[float, float]], points: Sequence[Point], hint: Box
) -> list[str]:
    """Names beside their points, each where it collides least with points and earlier names."""
    taken = [hint, *((x - 9, y - 9, x + 9, y + 9) for x, y in places)]
    parts = []
    for (x, y), point in zip(places, points, strict=True):
        if not point.label:
            continue
        width = len(point.label) * size.text * LETTER
        choices = [
            (x + 13, y + 4, "start"), (x - 13, y + 4, "end"),
            (x, y - 15, "middle"), (x, y + 24, "middle"),
            (x + 11, y - 11, "start"), (x - 11, y - 11, "end"),
            (x + 11, y + 19, "start"), (x - 11, y + 19, "end"),
        ]  # fmt: skip
        boxes = [_box(choice, width, size.text) for choice in choices]
        costs = [_cost(box, taken, size) for box in boxes]
        chosen = costs.index(min(costs))
        taken.append(boxes[chosen])
        at_x, at_y, anchor = choices[chosen]
        parts.append(written(at_x, at_y, point.label, "name", anchor))
    return parts


def _box(choice: tuple[float, float, str], width: float, text: float) -> Box:
    x, y, anchor = choice
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return left, y - text, left + width, y + 4


def _cost(box: Box, taken: Sequence[Box], size: Size) -> float:
    """Area of a box that is taken or outside of the plot."""
    inside = (size.left, size.top, size.width, size.height - size.bottom)
    area = (box[2] - box[0]) * (box[3] - box[1])
    return 3 * (area - _overlap(box, inside)) + sum(_overlap(box, other) for other in taken)


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def bar_plot(
    bars: Sequence[Bar],
    kinds: Sequence[str],
    form: Callable[[float], str],
    label: str,
    wide: Size = BROAD,
) -> str:
    """Stacked horizontal bars on one scale.

    Args:
        bars: from top to bottom.
        kinds: all kinds of parts; the number of a kind is its colour's (class `k0`, `k1` ...).
        form: writes a part's value.
        label: what the plot shows, for those who can't see it.
        wide: size for wide screens; the bars make the height.

    Returns:
        SVG, for wide and narrow screens.
    """
    longest = max((sum(value for _, value in bar.parts) for bar in bars), default=0) or 1.0

    def draw(size: Size) -> str:
        # On narrow screens the notes stand above the bars, which else had no room.
        beside = size.width > NARROW.width
        notes = max((len(bar.note) for bar in bars), default=0) * size.text * LETTER
        room = size.width - (notes + 18 if beside else 0)
        parts = []
        for number, bar in enumerate(bars):
            top = 6 + number * 58
            width = sum(value for _, value in bar.parts) / longest * room
            at, down = (width + 8, top + 36) if beside else (size.width, top + 12)
            parts.append(written(0, top + 12, bar.name, "name", "start"))
            parts.append(_bar(bar, kinds, form, top + 20, room / longest))
            parts.append(written(at, down, bar.note, "tick", "start" if beside else "end"))
        return "".join(parts)

    height = 12 + 58 * len(bars)
    large, small = (replace(size, height=height) for size in (wide, NARROW))
    return _both(draw, label, large, small)


def _bar(
    bar: Bar, kinds: Sequence[str], form: Callable[[float], str], top: float, unit: float
) -> str:
    total, x, parts = sum(value for _, value in bar.parts), 0.0, []
    for kind, value in sorted(bar.parts, key=lambda part: kinds.index(part[0])):
        width = value * unit
        about = f"{bar.name}, {kind}: {form(value)} ({value / (total or 1):.0%})"
        parts.append(
            f'<rect class="k{kinds.index(kind)}" x="{x:.1f}" y="{top}" width="{width:.1f}" '
            f'height="22"><title>{escape(about)}</title></rect>'
        )
        x += width
    return "".join(parts)


def interval_gauge(
    value: float, low: float, high: float, span: float, colour: int, about: str
) -> str:
    """A ratio and its interval around 1, on a logarithmic scale from 1/span to span."""
    width, height = 240, 34
    scale = Scale(1 / span, span, True, 6, width - 6)
    ends = [scale(min(max(each, 1 / span), span)) for each in (low, value, high)]
    return (
        f'<svg class="gauge s{colour % COLOURS}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(about)}"><path class="grid" d="M6 11H{width - 6}"/>'
        f'<path class="one" d="M{scale(1)} 3V19"/>{written(scale(1), 32, "base", "tick", "middle")}'
        f'<path class="range" d="M{ends[0]} 11H{ends[2]}"/>{_dot(ends[1], 11, about, "dot", 5.5)}'
        + written(6, 32, "slower", "tick", "start")
        + written(width - 6, 32, "faster", "tick", "end")
        + "</svg>"
    )
