"""Tables of costs: which unit, how many digits, which column where."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pared.bench.bill import Bill, Line
    from pared.bench.savings import Savings

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
NONE = "-"
DENOISER = "denoiser"


class Unit:
    """One decimal unit for a whole column, so that its numbers compare at a glance.

    Args:
        largest: the largest number of the column.
        least: how large it is to be in the unit, at least.
    """

    def __init__(self, largest: float, least: float = 100) -> None:
        fitting = ((s, p) for s, p in PREFIXES if largest / s >= least)
        self.size, self.prefix = next(fitting, (1.0, ""))

    def __call__(self, number: float) -> str:
        """The number in the unit, with one decimal."""
        if number == 0:
            return NONE
        value = number / self.size
        if self.size == 1:
            return f"{value:,.0f}"
        return f"{value:,.1f}" if value >= 0.05 else "<0.1"


def short(number: float, what: str = "") -> str:
    """A number in the unit that suits it, with four digits, e.g. "26.18 TMACs"."""
    if number == 0:
        return NONE
    number = float(f"{number:.4g}")  # first, for 999.99 belongs to the next unit
    size, prefix = next(((s, p) for s, p in PREFIXES if number >= s), (1.0, ""))
    return f"{_digits(number / size, 4 if size > 1 else 0)} {prefix}{what}".rstrip()


def memory(size: float) -> str:
    """Bytes in binary units, with three digits, e.g. "2.28 GiB"."""
    if size == 0:
        return NONE
    for bound, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= bound:
            return f"{_digits(size / bound, 3)} {unit}"
    return f"{size:.0f} B"


def _digits(value: float, count: int) -> str:
    """A number of at least 1 with so many digits in all, or more if its whole part has more."""
    whole = int(float(f"{value:.{max(count, 1)}g}"))
    return f"{value:.{max(0, count - len(str(whole)))}f}"


def percent(part: float, whole: float) -> str:
    """A share, e.g. "73.4%"."""
    if part == 0:
        return NONE
    share = 100 * part / whole
    return f"{share:.1f}%" if share >= 0.05 else "<0.1%"


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), gap: int = 2) -> list[str]:
    """Rows as lines of text.

    Args:
        rows: cells, as many in each row.
        left: the columns that are aligned to the left; the others go to the right.
        gap: blanks between columns.
    """
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if c in left else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * gap).join(cells).rstrip())
    return lines


def change(number: float) -> str:
    """A difference with its sign, e.g. "+93.60 M"."""
    return "-" if number == 0 else ("+" if number > 0 else "-") + short(abs(number))


# The bill -------------------------------------------------------------------------------------


def bill_text(bill: Bill) -> str:
    """The bill as a table of at most 100 columns."""
    over, under, *body, total = columns([*_heads(bill), *_rows(bill)])
    rule = "-" * len(under)
    table = [over, under, rule, *body, rule, total]
    return "\n".join([bill.headline, "", *table, "", *_foot(bill)])


def bill_markdown(bill: Bill) -> str:
    """The bill as a Markdown table."""
    over, under = _heads(bill)
    heads = [f"{a} {b}".strip() for a, b in zip(over, under, strict=True)]
    # Markdown drops leading blanks; no-break ones stay.
    rows = [[row[0].replace("  ", "&nbsp;&nbsp;"), *row[1:]] for row in _rows(bill)]
    table = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([f"**{bill.headline}**", "", *lines, "", *_foot(bill)])


def _units(bill: Bill) -> tuple[Unit, Unit]:
    """Of the column of one pass, and of the column of one image."""
    return Unit(max(bill.per_pass, *(line.macs for line in bill.lines))), Unit(bill.per_image)


def _heads(bill: Bill) -> list[list[str]]:
    (one, image), made = _units(bill), f"per {_made(bill)}"
    return [
        ["", f"{one.prefix}MACs", "", f"{image.prefix}MACs", "", "", "", "tensors", "largest"],
        ["", "per pass", "passes", made, "share", "params", "weights", "per pass", "tensor"],
    ]


def _rows(bill: Bill) -> list[list[str]]:
    own = [line for line in bill.lines if line.part == DENOISER]
    rest = [line for line in bill.lines if line.part != DENOISER]
    rows = [_row(bill, "denoiser", own), *(_row(bill, f"  {line.kind}", [line]) for line in own)]
    rows += [_row(bill, f"{line.part.replace('_', ' ')}, {line.kind}", [line]) for line in rest]
    total = _row(bill, "total", bill.lines)
    # Passes of different parts don't add up.
    total[1] = total[2] = total[7] = ""
    return [*rows, total]


def _row(bill: Bill, name: str, lines: Sequence[Line]) -> list[str]:
    one, image = _units(bill)
    total = sum(line.total for line in lines)
    return [
        name,
        one(sum(line.macs for line in lines)),
        str(lines[0].passes),
        image(total / bill.batch),
        percent(total, bill.total),
        short(sum(line.parameters for line in lines)),
        memory(sum(line.weight_bytes for line in lines)),
        memory(sum(line.activation_bytes for line in lines)),
        memory(max(line.largest_bytes for line in lines)),
    ]


def _foot(bill: Bill) -> list[str]:
    """The product in words, how to read the columns, and what to know."""
    own = sum(line.total for line in bill.lines if line.part == DENOISER) / bill.batch
    one = short(bill.per_pass / bill.batch, "MACs")
    steps, passes = counted(bill.steps, "step"), counted(bill.passes, "pass")
    image, flops = short(bill.per_image, "MACs"), short(2 * bill.per_image, "FLOPs")
    return [
        f"Denoiser: {steps} x {passes} x {one} = {short(own, 'MACs')} per {_made(bill)}.",
        f"Everything: {image} per {_made(bill)}, which is {flops} (a MAC is two FLOPs).",
        *_kept(bill),
        "Tensors: all that pass between layers, each counted once. Training keeps about all of",
        "them, sampling a few at a time. Attention maps aren't counted: fused kernels write none.",
        *(f"Note: {note}." for note in bill.notes),
    ]


def _made(bill: Bill) -> str:
    return "video" if bill.frames > 1 else "image"


def _kept(bill: Bill) -> list[str]:
    """What lies on the disk of a product with several denoisers."""
    if bill.models == 1:
        return []
    return [
        f"Kept: {counted(bill.models, 'denoiser')} and what they share, "
        f"{short(bill.kept_parameters)} parameters, {memory(bill.kept_bytes)}."
    ]


# Savings --------------------------------------------------------------------------------------


def savings_text(savings: Savings) -> str:
    """What every conversion would change, and what is left out and why."""
    if savings:
        lines = ["What conversions would change, with their default settings", "", *_fits(savings)]
    else:
        lines = ["No conversion fits this model"]
    if savings.refused:
        lines += ["", "Left out:"]
    for slug, reason in savings.refused.items():
        said = reason if reason.startswith(slug) else f"{slug}: {reason}"
        lines += textwrap.wrap(said, 98, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _fits(savings: Savings) -> list[str]:
    unit = Unit(max(max(each.before, each.after) for each in savings))
    rows = [
        ["", f"{unit.prefix}MACs", "fewer", "fewer", "", ""],
        ["", "per pass", "per pass", "per image", "params", "what changes per pass"],
        ["as it is", unit(savings[0].before), "", "", "", ""],
    ]
    for each in savings:
        ratios = [f"{each.ratio:.2f}x", f"{each.image_ratio:.2f}x"]
        rows.append([each.spec, unit(each.after), *ratios, change(each.parameters), ""])
        changes = [f"{m.kind} {unit(m.before)} -> {unit(m.after)}" for m in each.moves] or [""]
        # The first stands in the method's own row, the others below it.
        rows[-1][-1] = changes[0]
        rows += [["", "", "", "", "", text] for text in changes[1:]]
    over, under, *body = columns(rows, left=(0, 5))
    width = max(len(line) for line in (over, under, *body))
    return [
        *(over, under, "-" * width, *body, ""),
        "Arithmetic alone: quality takes healing and the bench to know, time takes a clock.",
    ]


# Words ----------------------------------------------------------------------------------------


def counted(count: int, what: str) -> str:
    """A number of things, e.g. "2 passes"."""
    plural = "es" if what.endswith("s") else "s"
    return f"{count} {what}{plural if count != 1 else ''}"
