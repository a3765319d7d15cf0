"""Figures of result files as SVG files, for pages whose theme a picture can't see."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from pared.bench import plots
from pared.bench.axes import WIDE, Axis
from pared.bench.graphs import pareto

# Colours that read on light and on dark ground.
COLOURS = ("#8a8f98", "#2f7de1", "#e0662c", "#12a08d", "#9a63e8", "#d8447f", "#b3921b", "#6a9a2b")
STYLE = """
text { font: 13px ui-sans-serif, system-ui, sans-serif; fill: #808690; }
path { fill: none; } .grid { stroke: #808690; stroke-opacity: .25; } .axis { stroke: #808690; }
.line { stroke-width: 2.5; stroke-linejoin: round; }
"""
OF_POINTS = """
.front { stroke: #808690; stroke-dasharray: 3 5; stroke-width: 1.5; }
.halo { fill: none; stroke-opacity: .5; stroke-width: 2; } .dot { fill-opacity: .75; }
"""


def drawn(name: str, figure: dict[str, Any]) -> str:
    """A figure of a result file as an SVG file.

    Args:
        name: of the figure.
        figure: as `pared.results` describes it: curves, bars or points.
    """
    draw = {"series": _curves, "bars": _bars, "points": _points}
    return next(draw[key](name, figure) for key in draw if key in figure)


def _curves(name: str, figure: dict[str, Any]) -> str:
    series = [
        plots.Series(line, points, colour)
        for colour, (line, points) in enumerate(figure["series"].items())
    ]
    plot = plots.line_plot(series, *_axes(figure), name)
    style = "".join(
        f".s{n} .line {{ stroke: {c}; }} .s{n} .dot {{ fill: {c}; }}" for n, c in enumerate(COLOURS)
    )
    return _file(plot, STYLE + style, list(figure["series"]))


def _points(name: str, figure: dict[str, Any]) -> str:
    points = [
        plots.Point(label, x, y, colour)
        for colour, group in enumerate(figure["points"].values())
        for label, x, y in group
    ]
    best = pareto([(p.x, p.y) for p in points], higher=False)
    plot = plots.scatter_plot(points, *_axes(figure), name, best)
    style = "".join(
        f".s{n} .halo {{ stroke: {c}; }} .s{n} .dot {{ fill: {c}; }}" for n, c in enumerate(COLOURS)
    )
    note = "Ringed: no other point is lower in both."
    return _file(plot, STYLE + OF_POINTS + style, list(figure["points"]), note)


def _bars(name: str, figure: dict[str, Any]) -> str:
    measure = figure["x"]
    bars = [
        plots.Bar(bar, [(measure, value)], f"{value:.4g}") for bar, value in figure["bars"].items()
    ]
    plot = plots.bar_plot(bars, [measure], "{:.4g}".format, name, WIDE)
    style = f".k0, .s0 .dot {{ fill: {COLOURS[1]}; }}"
    return _file(plot, STYLE + style, [measure])


def _axes(figure: dict[str, Any]) -> tuple[Axis, Axis]:
    x = Axis(figure["x"], figure["log"], lambda v: f"{v:,.0f}" if v == round(v) else f"{v:g}")
    return x, Axis(figure["y"], figure["log"], lambda value: f"{value:g}")


def _file(plot: str, style: str, legend: Sequence[str], note: str = "") -> str:
    """The wide form of a plot with a legend below it, and a line of words below that."""
    head, _, body = plot.partition("</svg>")[0].partition(">")
    width, top = map(int, re.findall(r"\d+", head.partition("viewBox=")[2])[2:4])
    entries = "".join(
        f'<g class="s{n % plots.COLOURS}"><circle class="dot" cx="{72 + n % 2 * 250}" '
        f'cy="{top + 14 + n // 2 * 20}" r="5"/></g>'
        f'<text x="{84 + n % 2 * 250}" y="{top + 18 + n // 2 * 20}">{escape(entry)}</text>'
        for n, entry in enumerate(legend)
    )
    height = top + 20 * (-(-len(legend) // 2) + 1)
    if note:
        entries += f'<text x="66" y="{height}">{escape(note)}</text>'
        height += 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{style}</style>{body}{entries}</svg>\n'
    )
