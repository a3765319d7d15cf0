"""The sections that a bench's page is made of. Each takes plain data and can stand on any page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pared.bench import plots
from pared.bench.figures import BY_KEY, Column, Figure, times
from pared.bench.graphs import bill_section, tradeoff_sections
from pared.bench.page import Section, first_sentence, picture

if TYPE_CHECKING:
    from pared.bench.report import Report, Row

KIND_NAMES = {
    "base": "base",
    "runtime": "run-time",
    "converted": "converted here",
    "model": "own model",
    "fewer steps": "rival",
}
# What a card says in place of its methods, when it has none.
UNNAMED = {"fewer steps": "nothing but fewer steps", "runtime": "no method"}
# Pictures up to this size are shown enlarged, pixel by pixel.
TINY = 128
# Small pictures that stand side by side.
ABREAST = 4
# Rows of larger pictures on a page, which is to stay small enough to send.
LARGE_SHOWN = 8
# Width of a wide screen's content, see page.css.
PAGE = 1144


def of_report(report: Report) -> list[Section]:
    """All sections of a bench's report; the last one holds its conditions."""
    colours = colours_of(report.rows)
    found = [
        verdict_section(report.rows, report.notes, colours),
        picture_section(report, colours),
        *tradeoff_sections(report.rows, colours),
        bill_section(
            [
                {"arm": r.name, "lines": [{"kind": k, "macs": v} for k, v in r.bill.items()]}
                for r in report.rows
            ]
        ),
        table_section(report, colours),
        command_section(report),
        condition_section(report.conditions),
    ]
    return [section for section in found if section is not None]


def colours_of(rows: Sequence[Row]) -> dict[str, int]:
    """The colour of each arm on all plots; rivals share the base's, since they are the base."""
    colours, used = {}, 0
    for row in rows:
        own = row.kind not in ("base", "fewer steps")
        used += own
        colours[row.name] = 1 + (used - 1) % (plots.COLOURS - 1) if own else 0
    return colours


# Verdicts -----------------------------------------------------------------------------------------


def verdict_section(
    rows: Sequence[Row], notes: Sequence[str], colours: Mapping[str, int]
) -> Section:
    """A card for every arm but the base, and what speaks against the figures."""
    ratios = [row.figures["ratio"] for row in rows if "ratio" in row.figures]
    ends = [end for r in ratios for end in (r.low or r.value, r.high or r.value)]
    span = max([1.25, *(max(end, 1 / end) for end in ends if end > 0)]) * 1.05
    cards = "".join(_card(row, rows[0], colours[row.name], span) for row in rows[1:])
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    alarm = " alarm" if any(row.verdict.startswith("No ") for row in rows) else ""
    beside = (
        f'<aside class="notes{alarm}"><h3>To know</h3><ul>{listed}</ul></aside>' if notes else ""
    )
    return Section("Verdicts", f'<div class="cards">{cards}</div>{beside}')


def _card(row: Row, base: Row, colour: int, span: float) -> str:
    speed = row.figures.get("ratio")
    if speed is None:
        big = '<p class="speed none">not timed</p>'
    else:
        spread = (
            f" <small>{speed.low:.2f} to {speed.high:.2f}</small>" if speed.low is not None else ""
        )
        low, high = speed.low or speed.value, speed.high or speed.value
        about = f"speed {speed.write(times)} of the base's"
        gauge = plots.interval_gauge(speed.value, low, high, span, colour, about)
        big = f'<p class="speed">{times(speed.value)}{spread}</p>{gauge}'
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
        for name, text in _facts(row, base)
    )
    # Always a line, so that the figures of all cards stand level.
    spec = (
        f'<p class="spec">{escape(", ".join(row.stack) or UNNAMED.get(row.kind, "as given"))}</p>'
    )
    return (
        f'<article class="card s{colour}"><h3>{_swatch(row)}{escape(row.name)}'
        f'<span class="badge">{KIND_NAMES.get(row.kind, row.kind)}</span></h3>{spec}{big}'
        f'{_said(row)}<dl class="facts">{facts}</dl></article>'
    )


def _said(row: Row) -> str:
    """The verdict, without a first sentence that only says the large figure again."""
    first, rest = first_sentence(row.verdict)
    text = (
        rest if first.startswith(times(row.figures.get("ratio", Figure(0)).value)) else row.verdict
    )
    return f'<p class="said">{escape(text)}</p>' if text else ""


def _facts(row: Row, base: Row) -> list[tuple[str, str]]:
    """The few figures that belong on a card."""
    found = []
    for key, name in (("macs_per_image", "MACs"), ("parameters", "parameters")):
        if key in row.figures and base.figures.get(key, Figure(0)).value:
            change = row.figures[key].value / base.figures[key].value - 1
            found.append((name, "same" if abs(change) < 0.0005 else f"{change:+.1%}"))
    pictures = [key for key in ("ssim", "sharpness") if key in row.figures]
    # Where there are pictures, they say more than the parameters.
    found = found[:1] if pictures else found
    for key in pictures:
        column = BY_KEY[key]
        found.append((column.title, row.figures[key].write(column.form, spread=False)))
    return found


# Pictures -----------------------------------------------------------------------------------------


def picture_section(report: Report, colours: Mapping[str, int]) -> Section | None:
    """The pictures: a column for each arm, a row for each prompt and noise."""
    if not report.images:
        return None
    rows = [row for row in report.rows if row.name in report.images]
    heads = "".join(
        f'<th scope="col" class="s{colours[row.name]}">{_swatch(row)}{escape(row.name)}</th>'
        for row in rows
    )
    height, width = next(iter(report.images.values())).shape[1:3]
    tiny = " tiny" if max(height, width) <= TINY else ""
    shown = report.prompts if tiny else report.prompts[:LARGE_SHOWN]
    body = [
        f'<tr class="prompt"><th scope="rowgroup" colspan="{len(rows)}"><span>{escape(prompt)}'
        f"</span></th></tr><tr>{''.join(_shot(report, row, number) for row in rows)}</tr>"
        for number, prompt in enumerate(shown)
    ]
    # Few arms of small pictures leave room for several prompts side by side.
    beside = max(1, ABREAST // len(rows)) if tiny else 1
    large, small = _shot_widths(width, len(rows) * beside)
    each = math.ceil(len(body) / beside)
    tables = "".join(
        f'<table class="shots{tiny}" style="--large:{large}px;--small:{small}px">'
        f"<thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(body[start : start + each])}</tbody></table>"
        for start in range(0, len(body), each)
    )
    switch = (
        '<div class="switch needs-script" role="group" aria-label="What is shown">'
        '<button type="button" data-show="plain" aria-pressed="true">Pictures</button>'
        '<button type="button" data-show="difference" aria-pressed="false">'
        "Difference to the base, 4x</button></div>"
    )
    grid = f'<div class="scroll abreast">{tables}</div>'
    lead = (
        f"{width}x{height} pixels. Each row is painted from one prompt and one noise; below each "
        "picture its PSNR to the base's, in dB."
    )
    return Section("Pictures", switch + grid, lead)


def _shot_widths(width: int, columns: int) -> tuple[int, int]:
    """How wide pictures are shown on a wide screen and on a phone."""
    room = PAGE // columns - 14
    if width <= TINY:
        # Whole multiples, so that all pixels come out alike.
        return width * min(256 // width, max(1, room // width)), width * max(1, 128 // width)
    return min(width, max(160, min(room, 360))), 150


def _shot(report: Report, row: Row, number: int) -> str:
    image = report.images[row.name][number]
    prompt = report.prompts[number]
    below = ""
    if number < len(row.psnr):
        below = f"<small>{escape(BY_KEY['psnr'].form(row.psnr[number]))}</small>"
    height, width = image.shape[:2]
    return (
        f'<td><button type="button" class="shot" data-arm="{escape(row.name)}" '
        f'data-row="{number}" data-prompt="{escape(prompt)}">'
        f'<img src="{picture(image)}" alt="{escape(row.name)}: {escape(prompt)}" '
        f'width="{width}" height="{height}"></button>{below}</td>'
    )


# Figures and conditions ---------------------------------------------------------------------------


def table_section(report: Report, colours: Mapping[str, int]) -> Section:
    """All figures of all arms: a column for each arm, a row for each figure."""
    rows = report.rows
    heads = "".join(
        f'<th scope="col" class="s{colours[row.name]}">{_swatch(row)}{escape(row.name)}</th>'
        for row in rows
    )
    body, group = [], ""
    for column in report.columns:
        if column.group != group:
            group = column.group
            body.append(
                f'<tr class="group"><th scope="rowgroup" colspan="{len(rows) + 1}">'
                f"<span>{escape(group)}</span></th></tr>"
            )
        best = _best(rows, column)
        cells = "".join(_cell(row, column, row.name == best) for row in rows)
        about = f"<small>{escape(column.about)}</small>"
        body.append(f'<tr><th scope="row">{escape(column.title)}{about}</th>{cells}</tr>')
    html = (
        f'<div class="scroll"><table class="figures"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    lead = (
        "Times are medians, with the 10th and 90th percentile below them; the rest are means with "
        "their 95 % intervals. Bold is the best arm."
    )
    return Section("Figures", html, lead)


def _cell(row: Row, column: Column, best: bool) -> str:
    figure = row.figures.get(column.key)
    if figure is None:
        return '<td class="none">-</td>'
    text = escape(figure.write(column.form, spread=False))
    spread = ""
    if figure.ends is not None:
        low, high = map(column.form, figure.ends)
        if not low == high == text:
            spread = f"<small>{escape(low)} to {escape(high)}</small>"
    return f"<td{' class=best' if best else ''}>{text}{spread}</td>"


def _swatch(row: Row) -> str:
    return f'<i class="swatch{" hollow" if row.kind == "fewer steps" else ""}"></i>'


def _best(rows: Sequence[Row], column: Column) -> str | None:
    """The arm that alone is best in a column."""
    values = {
        row.name: row.figures[column.key].value
        for row in rows
        if column.key in row.figures and row.kind != "base"
    }
    if column.better is None or len(values) < 2:
        return None
    best = (max if column.better == "higher" else min)(values.values())
    winners = [name for name, value in values.items() if value == best]
    return winners[0] if len(winners) == 1 else None


def command_section(report: Report) -> Section | None:
    """What to type for the first picture of each arm."""
    front = report.front

    def named(row: Row) -> str:
        name = escape(row.name)
        return f"<strong>{name}</strong>" if row.name in front else name

    terms = "".join(
        f"<dt>{named(row)}</dt><dd><code>{escape(row.command)}</code></dd>"
        for row in report.rows
        if row.command
    )
    lead = (
        "Each paints the first picture of an arm. Bold: nothing else here is both faster and "
        "nearer to the base."
    )
    return Section("Commands", f'<dl class="terms">{terms}</dl>', lead) if terms else None


def condition_section(conditions: Mapping[str, Any]) -> Section:
    """What the figures hold for, folded away."""
    command = conditions.get("command")
    said = f"<pre><code>{escape(str(command))}</code></pre>" if command else ""
    terms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
        for name, text in _flat({k: v for k, v in conditions.items() if k != "command"})
    )
    html = (
        "<details><summary>Machine, versions, settings and command</summary>"
        f'{said}<dl class="terms">{terms}</dl></details>'
    )
    return Section("Conditions", html)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as names and texts."""
    found = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}: ")
        elif isinstance(value, (list, tuple)):
            found.append((name, "; ".join(map(str, value)) or "none"))
        elif isinstance(value, float):
            found.append((name, f"{value:,.4g}" if value < 1e6 else f"{value:.4g}"))
        else:
            found.append((name, "none" if value is None else str(value)))
    return found
