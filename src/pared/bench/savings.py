"""What each registered conversion would change on a bill, counted, before anything is trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from pared import info, method
from pared.bench import bill_tables, costs
from pared.bench.bill import Bill, Order
from pared.bench.targets import read
from pared.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pared.info import Info

# Changes below this share of a pass aren't worth a word.
NOTEWORTHY = 0.001


@dataclass(frozen=True)
class Move:
    """How one kind of the denoiser's work changes.

    Attributes:
        kind: one of `pared.bench.costs.KINDS`.
        before: multiply-adds of one pass.
        after: likewise, converted.
    """

    kind: str
    before: int
    after: int


@dataclass(frozen=True)
class Saving:
    """What one conversion, with its default settings, would make of a bill.

    Attributes:
        slug: the method.
        spec: how it is asked for.
        before: multiply-adds of one pass of the denoiser.
        after: likewise, converted.
        image_before: multiply-adds of a picture with everything.
        image_after: likewise, converted.
        parameters: how many the denoiser gains (loses, if negative).
        training: whether it must be trained before it is of use.
        moves: the kinds of work that change, the largest change first.
    """

    slug: str
    spec: str
    before: int
    after: int
    image_before: float
    image_after: float
    parameters: int
    training: bool
    moves: tuple[Move, ...]

    @property
    def ratio(self) -> float:
        """How many times fewer multiply-adds one pass has; below 1 it has more."""
        return self.before / self.after

    @property
    def image_ratio(self) -> float:
        """The same for a picture, with text encoders and decoding."""
        return self.image_before / self.image_after

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and text, ready for JSON."""
        ratios = {"ratio": self.ratio, "image_ratio": self.image_ratio}
        return asdict(self) | ratios | {"moves": [asdict(move) for move in self.moves]}


class Savings(list[Saving]):
    """Savings, the largest first.

    Attributes:
        refused: the conversions that don't fit the model, by slug, with the reason.
    """

    def __init__(self, found: Iterator[Saving] | list[Saving], refused: dict[str, str]) -> None:
        super().__init__(sorted(found, key=lambda saving: -saving.ratio))
        self.refused = refused

    def table(self, format: Literal["text", "json"] = "text") -> str:
        """The savings to read ("text") or to compute with ("json")."""
        if format == "json":
            content = {"savings": [each.to_dict() for each in self], "refused": self.refused}
            return json.dumps(content, indent=1)
        return bill_tables.savings_text(self)

    def __str__(self) -> str:
        return self.table()


def savings(
    target: Any,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    passes: int | None = None,
    batch: int = 1,
    text_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    frames: int | None = None,
) -> Savings:
    """What every conversion that fits a model would save, counted on the meta device.

    Arithmetic only: what a saving does to the quality takes healing and the bench to know, and
    what it does to the time takes a clock.

    Args:
        target: as for `pared.bench.bill.bill`, like all others.
        height: of the picture in pixels.
        width: likewise.
        steps: of the denoiser.
        passes: of the denoiser per step.
        batch: pictures made at once.
        text_tokens: of the prompt.
        dtype: of the weights.
        frames: of a video.

    Returns:
        One saving per method, and the reasons of those that were left out.
    """
    found = read(target)
    order = Order(found, height, width, steps, passes, batch, text_tokens, dtype, frames=frames)
    before = order.bill(found.denoiser(dtype))
    savings, refused = [], {}
    for record in info.registry().values():
        if record.kind != "conversion":
            continue
        try:
            savings.append(_saving(record, order, before))
        except InputError as error:
            refused[record.slug] = str(error)
        except RuntimeError as error:  # what torch says of work that needs real numbers
            refused[record.slug] = f"it can't be counted on the meta device ({error})."
    return Savings(savings, refused)


def _saving(record: Info, order: Order, before: Bill) -> Saving:
    conversion = record.load()()
    denoiser = order.target.denoiser(order.dtype)
    if conversion in method.stack_of(denoiser):
        raise InputError(f"the model already carries {record.slug}.")
    method.convert(denoiser, conversion)
    after = order.bill(denoiser)
    return Saving(
        slug=record.slug,
        spec=conversion.spec(),
        before=before.per_pass,
        after=after.per_pass,
        image_before=before.per_image,
        image_after=after.per_image,
        parameters=after.parameters - before.parameters,
        training=record.training,
        moves=_moves(before, after),
    )


def _moves(before: Bill, after: Bill) -> tuple[Move, ...]:
    pairs = ((kind, before.kind(kind).macs, after.kind(kind).macs) for kind in costs.KINDS)
    moves = [Move(*pair) for pair in pairs]
    moves = [m for m in moves if abs(m.after - m.before) > NOTEWORTHY * before.per_pass]
    return tuple(sorted(moves, key=lambda m: -abs(m.after - m.before)))
