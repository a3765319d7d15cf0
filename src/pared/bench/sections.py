"""The sections that a bench's page is made of. Each takes plain data and can stand on any page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pared.bench import plots
from pared.bench.costs import KINDS
from pared.bench.figures import BY_KEY, Column, Figure, macs, seconds, times
from pared.bench.metering import OUTSIDE
from pared.bench.page import Section, first_sentence, picture
from pared.bench.scaling import crossover

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
# Figures that time can be weighed against, with the base's own value: the first found is drawn.
CLOSENESS = (("ssim", 1.0), ("relative_mse", 0.0))
REALISM = ("mmd_reference", "frechet_reference")
# Pictures up to this size are shown enlarged, pixel by pixel.
TINY = 128
# Width of a wide screen's content, see page.css.
PAGE = 1144
# A curve of more points than this is shown smoothed, with the raw one behind it.
RAW_POINTS = 60


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
    spec = f'<p class="spec">{escape(", ".join(row.stack) or UNNAMED.get(row.kind, "as given"))}</p>'
    return (
        f'<article class="card s{colour}"><h3>{_swatch(row)}{escape(row.name)}'
        f'<span class="badge">{KIND_NAMES.get(row.kind, row.kind)}</span></h3>{spec}{big}'
        f'{_said(row)}<dl class="facts">{facts}</dl></article>'
    )


def _said(row: Row) -> str:
    """The verdict, without a first sentence that only says the large figure again."""
    first, rest = first_sentence(row.verdict)
    text = rest if first.startswith(times(row.figures.get("ratio", Figure(0)).value)) else row.verdict
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
    body = "".join(
        f'<tr class="prompt"><th scope="rowgroup" colspan="{len(rows)}"><span>{escape(prompt)}'
        f"</span></th></tr><tr>{''.join(_shot(report, row, number) for row in rows)}</tr>"
        for number, prompt in enumerate(report.prompts)
    )
    height, width = next(iter(report.images.values())).shape[1:3]
    tiny = " tiny" if max(height, width) <= TINY else ""
    large, small = _shot_widths(width, len(rows))
    switch = (
        '<div class="switch needs-script" role="group" aria-label="What is shown">'
        '<button type="button" data-show="plain" aria-pressed="true">Pictures</button>'
        '<button type="button" data-show="difference" aria-pressed="false">'
        "Difference to the base, 4x</button></div>"
    )
    grid = (
        f'<div class="scroll"><table class="shots{tiny}" style="--large:{large}px;--small:{small}px">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )
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


# Time and quality ---------------------------------------------------------------------------------


def tradeoff_sections(rows: Sequence[Row], colours: Mapping[str, int]) -> list[Section]:
    """Time against closeness to the base, and against distance to real pictures if measured."""
    timed = [row for row in rows if "seconds" in row.figures]
    found = []
    for key, own in CLOSENESS:
        if any(key in row.figures for row in timed):
            html = _tradeoff(timed, colours, key, Figure(own))
            lead = "How close each arm stays to the base's pictures."
            found.append(Section("Time and closeness", html, lead, half=True))
            break
    for key in REALISM:
        if any(key in row.figures for row in timed):
            html = _tradeoff(timed, colours, key, None)
            lead = "How near each arm's pictures are to real ones, as a set."
            found.append(Section("Time and realism", html, lead, half=True))
            break
    return found


def _tradeoff(
    rows: Sequence[Row], colours: Mapping[str, int], key: str, base: Figure | None
) -> str:
    column = BY_KEY[key]
    points = []
    for row in rows:
        value = row.figures.get(key) or (base if row.kind == "base" else None)
        if value is not None:
            points.append(_point(row, colours[row.name], column, value))
    higher = column.better == "higher"
    best = pareto([(p.x, p.y) for p in points], higher)
    durations = [p.x for p in points]
    x = plots.Axis("seconds for one image", max(durations) > 6 * min(durations), _plain)
    arrow = "top left" if higher else "bottom left"
    better = "higher is better" if higher else "lower is better"
    label = f"{column.title} against time, {len(points)} arms"
    svg = plots.scatter_plot(
        points, x, plots.Axis(f"{column.title} ({better})", form=_plain), label, best, arrow
    )
    note = "Ringed and joined: nothing else here is both faster and better. Bars: 10th to 90th "
    return f'<figure>{svg}<figcaption>{note}percentile of time, 95 % of the mean.</figcaption></figure>'


def _point(row: Row, colour: int, column: Column, value: Figure) -> plots.Point:
    time = row.figures["seconds"]
    return plots.Point(
        label=row.name,
        x=time.value,
        y=value.value,
        colour=colour,
        hollow=row.kind == "fewer steps",
        x_range=None if time.low is None else (time.low, time.high),
        y_range=None if value.low is None else (value.low, value.high),
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
    legend = "".join(f'<li><i class="swatch k{kinds.index(k)}"></i>{escape(k)}</li>' for k in present)
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
        series, plots.Axis("step", form=_whole), plots.Axis(label, log, _plain), f"{label} by step"
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
        plots.Axis(x_label, log=True, form=_whole),
        plots.Axis(y_label, log=True, form=_plain),
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
        return '<td class="none">–</td>'
    text = escape(figure.write(column.form, spread=False))
    spread = ""
    if figure.low is not None and figure.high is not None:
        low, high = column.form(figure.low), column.form(figure.high)
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


def condition_section(conditions: Mapping[str, Any]) -> Section:
    """What the figures hold for, folded away."""
    command = conditions.get("command")
    said = f"<pre><code>{escape(str(command))}</code></pre>" if command else ""
    terms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
        for name, text in _flat({k: v for k, v in conditions.items() if k != "command"})
    )
    html = f'<details><summary>Machine, versions, settings and command</summary>{said}<dl class="terms">{terms}</dl></details>'
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
