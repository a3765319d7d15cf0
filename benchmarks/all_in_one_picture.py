"""The picture of the whole: what two products cost, and what they answer to the same requests."""

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from pared import results

# Pixels: of a picture, between them, of a column of requests, of the whole.
SIDE, GAP = 76, 6
COLUMN = 4 * SIDE + 3 * GAP
MARGIN, WIDTH = 16, 2 * COLUMN + 3 * 16
# What the bars at the top compare: preset, pixels, name.
BILLS = (("sd1.5", 1024, "SD 1.5, 1024 pixels"), ("sd3.5-medium", 2048, "SD 3.5 Medium, 2048"))
BAR, LABEL = 15, 190
# Letters that fit below a request.
LETTERS = 54
STYLE = """
text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #808690; }
.head { font-size: 15px; font-weight: 600; } .tick { font-size: 11px; }
.naive { fill: #8a8f98; } .ours { fill: #12a08d; } image { image-rendering: auto; }
"""


@dataclass(frozen=True)
class Line:
    """One request: its task and words, the given picture if any, both answers and the truth.

    Pictures are (3, height, width) in [0, 1].
    """

    task: str
    text: str
    given: Tensor | None
    naive: Tensor
    ours: Tensor
    truth: Tensor


def drawn(lines: Sequence[Line], rows: Sequence[dict[str, Any]]) -> str:
    """The picture as SVG.

    Args:
        lines: the requests to show.
        rows: of the table of answers, whose edits are timed; the other bars are those of
            results/product.json.
    """
    top, height = _bars(rows)
    below, bottom = _requests(lines, height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" width="{WIDTH}" '
        f'height="{bottom}" role="img" aria-label="One model for four tasks against four models">'
        f"<style>{STYLE}</style>{top}{below}</svg>\n"
    )


def _bars(answers: Sequence[dict[str, Any]]) -> tuple[str, int]:
    """Cost of an edit and parameters kept, both products, and where they end."""
    file = results.read("product")
    assert file is not None, "results/product.json is missing: python benchmarks/product.py"
    parts = [_text(MARGIN, 24, "Four models, three passes, softmax attention", "head naive")]
    parts.append(
        _text(MARGIN, 44, "or one model, one pass, linear attention: counted by pared bill",
              "head ours")
    )  # fmt: skip
    y = 64
    for preset, pixels, name in BILLS:
        rows = [r for r in file.tables[f"{preset}, 4 tasks"] if r["pixels"] == pixels]
        for what, unit in (("TMACs per edit", "TMACs"), ("parameters kept (M)", "M")):
            label = f"{name}: {'an edit' if unit == 'TMACs' else 'kept'}"
            parts += _pair(y, label, rows[0][what], rows[-1][what], unit)
            y += 2 * BAR + 12
    times = [row["milliseconds"] for row in answers if row["task"] == "edit"]
    parts += _pair(y, "House models, 64: an edit", times[0], times[1], "ms")
    return "".join(parts), y + 2 * BAR + 12


def _pair(y: int, label: str, naive: float, ours: float, unit: str) -> list[str]:
    room = WIDTH - 2 * MARGIN - LABEL - 150
    parts = [_text(MARGIN, y + BAR + 4, label)]
    for n, (value, kind) in enumerate(((naive, "naive"), (ours, "ours"))):
        length, top = room * value / naive, y + n * BAR
        note = f"{value:,.0f} {unit}"
        if kind == "ours":
            note += f", {naive / ours:.1f} times less"
        parts.append(
            f'<rect class="{kind}" x="{MARGIN + LABEL}" y="{top}" width="{length:.1f}" '
            f'height="{BAR - 3}"/>'
        )
        parts.append(_text(MARGIN + LABEL + length + 6, top + 10, note, f"tick {kind}"))
    return parts


def _requests(lines: Sequence[Line], top: int) -> tuple[str, int]:
    """The pictures in two columns, and where they end."""
    parts, y = [], top + 30
    parts.append(_text(MARGIN, top + 18, "The house models, the same requests from the same noise"))
    for column in range(2):
        x = MARGIN + column * (COLUMN + MARGIN)
        for n, name in enumerate(("given", "four models", "one model", "wanted")):
            kind = {1: "naive", 2: "ours"}.get(n, "")
            parts.append(_text(x + n * (SIDE + GAP), y + 10, name, f"tick {kind}"))
    y += 18
    for number, line in enumerate(lines):
        x = MARGIN + number % 2 * (COLUMN + MARGIN)
        for n, picture in enumerate((line.given, line.naive, line.ours, line.truth)):
            if picture is not None:
                parts.append(_image(x + n * (SIDE + GAP), y, picture))
        words = textwrap.shorten(f"{line.task}: {line.text}", LETTERS, placeholder=" ...")
        parts.append(_text(x, y + SIDE + 14, words, "tick"))
        if number % 2:
            y += SIDE + 26
    return "".join(parts), y + 4


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}">{escape(words)}</text>'


def _image(x: float, y: float, picture: Tensor) -> str:
    array: Any = (255 * picture.clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<image x="{x:.0f}" y="{y:.0f}" width="{SIDE}" height="{SIDE}" '
        f'href="data:image/png;base64,{data}"/>'
    )
