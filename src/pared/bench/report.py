"""The result of a bench: rows, pictures and conditions, and the forms it can be printed in."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pared.bench.bill_tables import columns
from pared.bench.figures import COLUMNS, Column, Figure
from pared.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from pared.bench.page import Section

Format = Literal["text", "md", "csv", "json"]
NONE = "-"


@dataclass(frozen=True)
class Row:
    """What was measured of one arm.

    Attributes:
        name: of the arm.
        kind: "base", "runtime", "converted", "model" or "fewer steps".
        stack: its methods as specs, e.g. "taylorseer:interval=4".
        steps: of a run; None where it has none.
        figures: by the keys of `pared.bench.figures.COLUMNS`; what was not measured is absent.
        bill: multiply-adds of one run by kind of work.
        verdict: what it all means, in words.
        psnr: of each of the report's pictures, to the base's.
        command: paints the first of its pictures; "" where no command does.
    """

    name: str
    kind: str
    stack: tuple[str, ...]
    steps: int | None
    figures: dict[str, Figure]
    bill: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    psnr: tuple[float, ...] = ()
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and text."""
        figures = {key: _plain(figure) for key, figure in self.figures.items()}
        return {
            "name": self.name,
            "kind": self.kind,
            "stack": list(self.stack),
            "steps": self.steps,
            "verdict": self.verdict,
            "figures": figures,
            "bill": dict(self.bill),
            "command": self.command,
        }


@dataclass(frozen=True)
class Report:
    """The result of `pared.bench`.

    Attributes:
        title: what was benched.
        headline: the result in a sentence or two.
        conditions: machine, versions, settings, prompts, date and command.
        rows: one per arm, the base first.
        prompts: of the pictures.
        images: by arm, uint8 (pictures, height, width, 3); picture i of every arm is painted from
            the same prompt and noise.
        notes: what the reader should know about the figures.
    """

    title: str
    headline: str
    conditions: dict[str, Any]
    rows: tuple[Row, ...]
    prompts: tuple[str, ...] = ()
    images: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> Row:
        """The row of an arm.

        Raises:
            InputError: there is no such arm.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(
            f"the report has no arm {name!r}; it has {', '.join(row.name for row in self.rows)}."
        )

    @property
    def front(self) -> list[str]:
        """The arms that no other beats in both time and closeness to the base, the fastest first.

        Base and rivals count. None where no pictures were made.
        """
        from pared.bench.graphs import front

        return front(self.rows)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that hold a figure for some arm."""
        return tuple(c for c in COLUMNS if any(c.key in row.figures for row in self.rows))

    def table(self, format: Format = "text") -> str:
        """The figures to read ("text", "md") or to compute with ("csv", "json").

        Raises:
            InputError: there is no such format.
        """
        if format == "text":
            return self._text()
        if format == "md":
            return self._markdown()
        if format == "csv":
            return self._csv()
        if format == "json":
            return json.dumps(self.to_dict(), indent=1)
        raise InputError(f"there is no format {format!r}; the formats are text, md, csv and json.")

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON."""
        return {
            "title": self.title,
            "headline": self.headline,
            "rows": [row.to_dict() for row in self.rows],
            "front": self.front,
            "notes": list(self.notes),
            "prompts": list(self.prompts),
            "conditions": self.conditions,
        }

    def save_json(self, path: str | Path) -> Path:
        """Writes the figures and conditions (no pictures) to a JSON file."""
        return _write(path, self.table("json") + "\n")

    def html(self, path: str | Path, extra_sections: Sequence[Section] = ()) -> Path:
        """Writes one self-contained page: pictures side by side, plots, table and conditions.

        Args:
            path: of the file.
            extra_sections: further sections, between the figures and the conditions.
        """
        from pared.bench.page import render
        from pared.bench.sections import of_report

        *body, conditions = of_report(self)
        sections = [*body, *extra_sections, conditions]
        return _write(path, render(self.title, self.headline, sections, subtitle=self._where()))

    def _where(self) -> str:
        """Machine and date, as far as they are known."""
        machine = self.conditions.get("machine", {})
        threads = self.conditions.get("threads")
        known = [
            machine.get("gpu") or machine.get("cpu"),
            f"{threads} thread{'s' if threads > 1 else ''}" if threads else None,
            str(self.conditions.get("date", "")).partition("T")[0],
        ]
        return ", ".join(each for each in known if each)

    # Tables -----------------------------------------------------------------------------------

    def _text(self) -> str:
        shown = [c for c in self.columns if c.short]
        cells = [["", *(c.title for c in shown)]]
        cells += [[row.name, *(_cell(row, c, False) for c in shown)] for row in self.rows]
        verdicts = [f"{row.name}: {row.verdict}" for row in self.rows if row.verdict]
        parts = [[self.title], columns(cells), verdicts, self._commands(), list(self.notes)]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _markdown(self) -> str:
        shown = self.columns
        lines = [["", *(c.title for c in shown)], ["---", *["---:"] * len(shown)]]
        # A bar in a name would begin a new cell.
        lines += [
            [row.name.replace("|", "\\|"), *(_cell(row, c, True) for c in shown)]
            for row in self.rows
        ]
        table = ["| " + " | ".join(line) + " |" for line in lines]
        verdicts = [f"- **{row.name}**: {row.verdict}" for row in self.rows if row.verdict]
        commands = ["```text", *told, "```"] if (told := self._commands()) else []
        notes = [f"- {note}" for note in self.notes]
        parts = [[f"**{self.title}**"], table, verdicts, commands, notes]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _commands(self) -> list[str]:
        """The command of each arm, those of the front marked."""
        front = self.front
        told = [row for row in self.rows if row.command]
        lines = [f"{'*' if r.name in front else ' '} {r.name}: {r.command}" for r in told]
        head = "How to paint each; * nothing else here is both faster and nearer to the base:"
        return [head, *lines] if lines else []

    def _csv(self) -> str:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        ends = [(c.key, end) for c in self.columns for end in Figure._fields]
        heads = [key if end == "value" else f"{key}_{end}" for key, end in ends]
        writer.writerow(["name", "kind", "stack", "steps", *heads, "verdict", "command"])
        for row in self.rows:
            figures = [_end(row.figures.get(key), end) for key, end in ends]
            stack = " ".join(row.stack)
            said = [row.verdict, row.command]
            writer.writerow([row.name, row.kind, stack, row.steps, *figures, *said])
        return file.getvalue()


def _cell(row: Row, column: Column, spread: bool) -> str:
    figure = row.figures.get(column.key)
    return NONE if figure is None else figure.write(column.form, spread)


def _end(figure: Figure | None, end: str) -> float | None:
    return None if figure is None else _plain(figure)[end]


def _plain(figure: Figure) -> dict[str, float | None]:
    """A figure for JSON, which knows no infinity."""
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in figure._asdict().items()
    }


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror}); choose another.") from None
    return path
