"""Sections with plots: time against quality, the bill, a healing's loss, where a method pays."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pared.bench import plots
from pared.bench.axes import Axis
from pared.bench.costs import KINDS
from pared.bench.figures import BY_KEY, Column, Figure, macs, seconds
from pared.bench.metering import OUTSIDE
from pared.bench.page import Section
from pared.bench.scaling import crossover

if TYPE_CHECKING:
    from pared.bench.report import Row

# Figures that time can be weighed against, with the base's own value: the first found is drawn.
CLOSENESS = (("ssim", 1.0), ("relative_mse", 0.0))
REALISM = ("mmd_reference", "frechet_reference")
# A curve of more points than this is shown smoothed, with the raw one behind it.
RAW_POINTS = 60


# Time and quality ---------------------------------------------------------------------------------


# An arm that was timed, and its figure of some kind.
Placed = tuple["Row", Figure]


def tradeoff_sections(rows: Sequence[Row], colours: Mapping[str, int]) -> list[Section]:
    """Time against closeness to the base, and against distance to real pictures if measured."""
    found = []
    column, placed = closeness(rows)
    if placed:
        html = _tradeoff(placed, colours, column)
        lead = "How close each arm stays to the base's pictures."
        found.append(Section("Time and closeness", html, lead, half=True))
    for key in REALISM:
        if placed := _placed(rows, key, None):
            html = _tradeoff(placed, colours, BY_KEY[key])
            lead = "How near each arm's pictures are to real ones, as a set."
            found.append(Section("Time and realism", html, lead, half=True))
            break
    return found


def front(rows: Sequence[Row]) -> list[str]:
    """The arms that no other beats in both time and closeness to the base, the fastest first.

    Rivals and the base are among those that count. None where no pictures were made.
    """
    column, placed = closeness(rows)
    best = sorted((placed[number][0] for number in _best(placed, column)), key=_time)
    return [row.name for row in best]


def closeness(rows: Sequence[Row]) -> tuple[Column, list[Placed]]:
    """The figure by which arms are close to the base, and the arms that have it."""
    for key, own in CLOSENESS:
        if placed := _placed(rows, key, Figure(own)):
            return BY_KEY[key], placed
    return BY_KEY[CLOSENESS[0][0]], []


def _placed(rows: Sequence[Row], key: str, base: Figure | None) -> list[Placed]:
    timed = [row for row in rows if "seconds" in row.figures]
    if not any(key in row.figures for row in timed):
        return []
    figures = [(row, row.figures.get(key)) for row in timed]
    figures = [(row, base if row.kind == "base" and f is None else f) for row, f in figures]
    return [(row, figure) for row, figure in figures if figure is not None]


def _best(placed: Sequence[Placed], column: Column) -> list[int]:
    points = [(_time(row), figure.value) for row, figure in placed]
    return pareto(points, higher=column.better == "higher")


def _time(row: Row) -> float:
    return row.figures["seconds"].value


def _tradeoff(placed: Sequence[Placed], colours: Mapping[str, int], column: Column) -> str:
    points = [_point(row, colours[row.name], column, figure) for row, figure in placed]
    higher = column.better == "higher"
    best = _best(placed, column)
    durations = [p.x for p in points]
    x = Axis("seconds for one image", max(durations) > 6 * min(durations), _plain)
    arrow = "top left" if higher else "bottom left"
    better = "higher is better" if higher else "lower is better"
    label = f"{column.title} against time, {len(points)} arms"
    svg = plots.scatter_plot(
        points, x, Axis(f"{column.title} ({better})", form=_plain), label, best, arrow
    )
    note = (
        "Ringed and joined: nothing else here is both faster and better. Bars: 10th to 90th "
        "percentile of time, 95 % interval of the mean."
    )
    return f"<figure>{svg}<figcaption>{note}</figcaption></figure>"


def _point(row: Row, colour: int, column: Column, value: Figure) -> plots.Point:
    time = row.figures["seconds"]
    return plots.Point(
        label=row.name,
        x=time.value,
        y=value.value,
        colour=colour,
        hollow=row.kind == "fewer steps",
        x_range=time.ends,
        y_range=value.ends,
        about=f"{row.name}: {time.write(seconds)}; {column.title} {value.write(column.form)}",
    )


def pareto(points: Sequence[tuple[float, float]], higher: bool) -> list[int]:
    """Numbers of the points (cost, merit) that no other one beats in both."""
    sign = 1 if higher else -1
    return [
        number
        for number, (x, y) in enumerate(points)
        if not any(
            other_x <= x and sign * other_y >= sign * y and (other_x, other_y) != (x, y)
            for other_x, other_y in points
        )
    ]


def _plain(value: float) -> str:
    return f"{value:.4g}"


# The bill -----------------------------------------------------------------------------------------


def bill_section(arms: Sequence[Mapping[str, Any]], title: str = "The bill") -> Section | None:
    """What each arm computes for one image, side by side.

    Args:
        arms: each with its "arm" (name) and its "lines": dicts with "kind" and "macs", or the
            lines of `pared.bill(...).to_dict()`.
        title: of the section.
    """
    bars = [_bill_bar(arm["arm"], arm["lines"]) for arm in arms if arm["lines"]]
    if not bars:
        return None
    kinds = [*KINDS, OUTSIDE]
    kinds += [k for bar in bars for k, _ in bar.parts if k not in kinds]
    first = sum(value for _, value in bars[0].parts)
    noted = [
        plots.Bar(bar.name, bar.parts, _bill_note(sum(v for _, v in bar.parts), first))
        for bar in bars
    ]
    present = [k for k in kinds if any(k == kind for bar in bars for kind, _ in bar.parts)]
    legend = "".join(
        f'<li><i class="swatch k{kinds.index(k)}"></i>{escape(k)}</li>' for k in present
    )
    svg = plots.bar_plot(noted, kinds, macs, "Multiply-adds by kind of work, one bar for each arm")
    lead = "Multiply-adds (MACs) of one run, by what they are spent on."
    html = f'<figure>{svg}<figcaption><ul class="legend">{legend}</ul></figcaption></figure>'
    return Section(title, html, lead)


def _bill_bar(name: str, lines: Sequence[Mapping[str, Any]]) -> plots.Bar:
    parts: dict[str, float] = {}
    for line in lines:
        kind = OUTSIDE if line.get("part", "denoiser") != "denoiser" else line["kind"]
        parts[kind] = parts.get(kind, 0) + line.get("total", line["macs"])
    return plots.Bar(name, tuple(parts.items()))


def _bill_note(total: float, base: float) -> str:
    share = "" if total == base or not base else f", {total / base:.2f}x"
    return f"{macs(total)}{share}"


# Curves -------------------------------------------------------------------------------------------


def curve_section(
    points: Sequence[tuple[float, float]], x_label: str, y_label: str, title: str, lead: str = ""
) -> Section:
    """One curve.

    Args:
        points: (x, y) in the order of x.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        title: of the section.
        lead: a sentence under the heading.
    """
    axes = Axis(x_label, form=_whole), Axis(y_label, form=_plain)
    svg = plots.line_plot([plots.Series(y_label, points)], *axes, f"{y_label} by {x_label}")
    return Section(title, f"<figure>{svg}</figure>", lead, half=True)


def healing_section(
    losses: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]] = (),
    lead: str = "",
    title: str = "Healing",
    label: str = "loss",
) -> Section:
    """The loss of a training, step by step.

    Args:
        losses: (step, loss) in order.
        held_out: (step, loss) on data that the training didn't see.
        lead: a sentence under the heading.
        title: of the section.
        label: of the vertical axis.
    """
    series = [plots.Series("training", losses, 1, dots=len(losses) <= RAW_POINTS)]
    if len(losses) > RAW_POINTS:
        raw = plots.Series("training", losses, 1, faint=True, dots=False)
        series = [raw, plots.Series("training", smoothed(losses), 1, dots=False)]
    if held_out:
        series.append(plots.Series("held out", held_out, 2))
    values = [value for each in series for _, value in each.points]
    log = min(values) > 0 and max(values) > 4 * min(values)
    svg = plots.line_plot(
        series, Axis("step", form=_whole), Axis(label, log, _plain), f"{label} by step"
    )
    names = [("training", 1), ("held out", 2)][: 2 if held_out else 1]
    return Section(title, f"<figure>{svg}{_legend(names)}</figure>", lead, half=True)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Running medians over a twentieth of the points, which single spikes don't move."""
    half = max(1, len(points) // 40)
    return [
        (x, statistics.median(y for _, y in points[max(0, i - half) : i + half + 1]))
        for i, (x, _) in enumerate(points)
    ]


def crossover_section(
    series: Mapping[str, Sequence[tuple[float, float]]],
    lead: str = "",
    title: str = "Where it pays",
    x_label: str = "image tokens",
    y_label: str = "seconds",
) -> Section:
    """Time against tokens, with the place from which the second line is faster than the first.

    Args:
        series: by name (tokens, seconds), ascending; the first is what the others are held against.
        lead: a sentence under the heading; by default what the crossing means.
        title: of the section.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
    """
    names = list(series)
    lines = [plots.Series(n, sorted(series[n]), colour) for colour, n in enumerate(names)]
    mark = None
    if len(lines) > 1:
        said, mark = _crossing(lines[0], lines[1], x_label)
        lead = lead or said[:1].upper() + said[1:]
    svg = plots.line_plot(
        lines,
        Axis(x_label, log=True, form=_whole),
        Axis(y_label, log=True, form=_plain),
        f"{y_label} against {x_label}: {', '.join(names)}",
        mark,
    )
    legend = _legend([(name, colour) for colour, name in enumerate(names)])
    return Section(title, f"<figure>{svg}{legend}</figure>", lead, half=True)


def _crossing(
    first: plots.Series, second: plots.Series, x_label: str
) -> tuple[str, tuple[float, float, str] | None]:
    """From where on the second line is below the first: in words, and as a mark for the plot."""
    other = dict(second.points)
    both = [(x, y, other[x]) for x, y in first.points if x in other]
    if len(both) < 2:
        return "", None
    xs, a, b = zip(*both, strict=True)
    found = crossover(xs, a, b)
    if found is None or found <= xs[0]:
        which = "slower" if found is None else "faster"
        return f"{second.name} is {which} than {first.name} throughout.", None
    words = f"{second.name} is faster than {first.name} from {found:,.0f} {x_label} on."
    return words, (found, _on_line(found, xs, a), f"{found:,.0f} {x_label}")


def _on_line(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The height of a line at x, straight between its points on logarithmic axes."""
    right = next(number for number, each in enumerate(xs) if each >= x)
    (x0, x1), (y0, y1) = xs[right - 1 : right + 1], ys[right - 1 : right + 1]
    share = math.log(x / x0) / math.log(x1 / x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _legend(names: Sequence[tuple[str, int]]) -> str:
    items = "".join(f'<li><i class="swatch s{c}"></i>{escape(name)}</li>' for name, c in names)
    return f'<figcaption><ul class="legend">{items}</ul></figcaption>'
