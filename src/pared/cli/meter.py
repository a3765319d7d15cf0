"""The line of `pared enhance` that shows how loud it is before and after."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING

import click

from pared.cli.sound_card import RATE

if TYPE_CHECKING:
    from torch import Tensor


class Meter:
    """A line with the levels of both sides, over and over, on the standard error.

    Args:
        wanted: False shows nothing; None only shows where a person is looking.
    """

    EVERY, CELLS, LOWEST = 0.1, 20, -60.0

    def __init__(self, wanted: bool | None) -> None:
        self.shown = sys.stderr.isatty() if wanted is None else wanted
        self.samples = 0
        self.sums, self.count = [0.0, 0.0], 0
        self.due = 0.0

    def show(self, taken: Tensor, given: Tensor) -> None:
        """Count a piece in and what came out, and draw the line where it is due."""
        if not self.shown:
            return
        self.samples += len(taken)
        self.count += len(taken)
        self.sums[0] += float(taken.square().sum())
        self.sums[1] += float(given.square().sum())
        if time.monotonic() >= self.due:
            self._draw()

    def _draw(self) -> None:
        if not self.count:
            return
        self.due = time.monotonic() + self.EVERY
        heard, kept = (self.bar(total / self.count) for total in self.sums)
        click.echo(f"\r{self.samples / RATE:8.1f} s  in {heard}  out {kept}", nl=False, err=True)
        self.sums, self.count = [0.0, 0.0], 0

    def bar(self, power: float) -> str:
        """`#####...............  -45 dB` from a mean power."""
        level = max(self.LOWEST, 10 * math.log10(power + 1e-12))
        cells = min(self.CELLS, round(self.CELLS * (1 - level / self.LOWEST)))
        return f"{'#' * cells:.<{self.CELLS}} {level:4.0f} dB"

    def close(self) -> None:
        """Draw what wasn't yet, and end the line."""
        self._draw()
        if self.samples:
            click.echo(err=True)
