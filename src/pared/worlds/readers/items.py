"""What all readers give: captioned images, checked once."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pared.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

NAMED = 5  # how many bad items a message names


@dataclass(frozen=True)
class Item:
    """One captioned image.

    Attributes:
        image: in RGB, upright, transparent parts on white.
        caption: never empty.
        key: the item's name within its source.
    """

    image: Image.Image
    caption: str
    key: str


class Unusable(Exception):
    """Why one item can't be used, in a few words."""


@dataclass(frozen=True)
class Raw:
    """An item as found: not yet decoded, perhaps unusable.

    Attributes:
        key: its name.
        image: the encoded image or the file that holds it.
        caption: as found.
        fault: what is already known to be wrong with it.
    """

    key: str
    image: bytes | Path | None = None
    caption: str | None = None
    fault: str = ""

    def item(self) -> Item:
        """Decode.

        Raises:
            Unusable: there is no caption or no readable image.
        """
        if self.fault:
            raise Unusable(self.fault)
        if self.image is None:
            raise Unusable("no image")
        if not self.caption or not self.caption.strip():
            raise Unusable("no caption")
        return Item(decode(self.image), self.caption.strip(), self.key)


def decode(image: bytes | Path, ground: str = "white") -> Image.Image:
    """An upright RGB image.

    Args:
        image: the encoded image or its file.
        ground: what shows through transparent parts.

    Raises:
        Unusable: the image is missing, truncated or of no known format.
    """
    from PIL import Image

    if isinstance(image, Path) and not image.is_file():
        raise Unusable("no such file")
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return upright_rgb(opened, ground)
    except Unusable:
        raise
    except Exception as error:  # broken files make Pillow's plugins raise nearly anything
        raise Unusable("the image can't be decoded") from error


def upright_rgb(image: Image.Image, ground: str = "white") -> Image.Image:
    """An image as cameras and paint programs mean it: upright, in RGB, on one ground.

    Raises:
        Unusable: grey levels that don't say what is white.
    """
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # Pillow would cut off at 255
        levels = np.asarray(upright).astype("uint32")
        upright = Image.fromarray((levels // 257).astype("uint8"))
    elif upright.mode in ("I", "F"):
        raise Unusable("its grey levels are of no known range")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    behind = Image.new("RGBA", upright.size, ground)
    return Image.alpha_composite(behind, upright.convert("RGBA")).convert("RGB")


class Items:
    """Captioned images that have been checked: iterate as often as needed, one image in memory.

    Args:
        source: what the user asked to read, for messages.
        raws: the items as found; each iteration must give the same ones.
        on_bad: "refuse" or "skip".

    Raises:
        InputError: there is nothing usable, or something unusable that is to be refused.
    """

    def __init__(self, source: str, raws: Iterable[Raw], on_bad: str):
        self.source = source
        self._raws = raws
        self._usable: list[int] | None = None
        self._faults: dict[int, str] = {}
        count = 0
        for position, raw in enumerate(raws):
            count += 1
            try:
                raw.item()
            except Unusable as fault:
                self._faults[position] = f"{raw.key} ({fault})"
        self._count, self._length = count, count - len(self._faults)
        if count == 0:
            raise InputError(f"{source!r} holds no images; give a source of captioned images.")
        if self._faults:
            report(source, list(self._faults.values()), count, on_bad, "an image and a caption")

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        for position, raw in enumerate(self._raws):
            if position not in self._faults:
                yield raw.item()

    def __getitem__(self, index: int) -> Item:
        """The item at a place, for drawing at random.

        Shards can only be read in order: at the first such call their items are taken into memory,
        as they are stored.
        """
        if self._usable is None:
            self._usable = [n for n in range(self._count) if n not in self._faults]
            if not hasattr(self._raws, "__getitem__"):
                self._raws = list(self._raws)
        return cast(Any, self._raws)[self._usable[index]].item()


def report(source: str, faults: list[str], count: int, on_bad: str, needs: str) -> None:
    """Refuse what can't be used, or warn of it and go on with the rest.

    Args:
        source: what the user asked to read.
        faults: the unusable items, each with why.
        count: items found.
        on_bad: "refuse" or "skip".
        needs: what an item must have, for the message when none is left.

    Raises:
        InputError: they are to be refused, or nothing else is left.
    """
    listed = ", ".join(faults[:NAMED]) + (", ..." if len(faults) > NAMED else "")
    found = f"{len(faults)} of {count} items in {source!r} can't be used: {listed}"
    if on_bad == "refuse":
        raise InputError(f"{found}; mend or remove them, or read with on_bad='skip'.")
    if len(faults) == count:
        raise InputError(f"{found}; at least one item needs {needs}.")
    # Points at whoever called `read`.
    warnings.warn(f"{found}; they are skipped.", stacklevel=4)


def caption_in(entry: dict, column: str | None) -> str:
    """The caption in a JSON object: under `column` if given, else under "text" or "caption".

    Raises:
        Unusable: there is none.
    """
    keys = (column,) if column else ("text", "caption")
    for key in keys:
        if isinstance(entry.get(key), str):
            return entry[key]
    raise Unusable(f"no caption under {' or '.join(map(repr, keys))}")
