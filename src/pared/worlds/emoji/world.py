"""Reading the emoji world's one file."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pared.errors import InputError
from pared.worlds.optional import need

if TYPE_CHECKING:
    from torch import Tensor

FILE = Path(__file__).with_name("emoji.parquet")
SPLITS = ("train", "heldout")
STORED_SIZE = 128


@dataclass(frozen=True, eq=False)
class Emoji:
    """Captioned pictures; row i of every field belongs together.

    Attributes:
        images: uint8, (count, 3, size, size), on white; None if loaded without pictures.
        captions: Unicode names in lower case: "man firefighter: medium-dark skin tone".
        characters: the emoji themselves, one or more code points each.
        groups: Unicode's groups: "People & Body", "Flags", ...
        bases: the concepts without skin tone and gender: "firefighter".
        skin_tones: "", "light" to "dark", or the tones of two people: "light, dark".
        genders: "", "man", "woman", "person" (neutral, beside gendered siblings), "boy", ...
        splits: "train" or "heldout".
    """

    images: Tensor | None
    captions: list[str]
    characters: list[str]
    groups: list[str]
    bases: list[str]
    skin_tones: list[str]
    genders: list[str]
    splits: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, indices: Iterable[int]) -> Emoji:
        """The rows at `indices`, in that order."""
        indices = [int(index) for index in indices]
        columns = {
            field.name: [getattr(self, field.name)[index] for index in indices]
            for field in fields(self)
            if field.name != "images"
        }
        images = None if self.images is None else self.images[indices]
        return replace(self, images=images, **columns)


def load(split: str | None = None, size: int | None = 64) -> Emoji:
    """The emoji world, in Unicode's order.

    Args:
        split: "train", "heldout", or None for both.
        size: height and width of the pictures, up to the stored 128; None leaves the pictures out.

    Raises:
        InputError: there is no such split, the size is out of range, or pyarrow is missing.
    """
    if split is not None and split not in SPLITS:
        raise InputError(
            f"the emoji world has no split {split!r}; it has {' and '.join(SPLITS)}, "
            "and None stands for both."
        )
    if size is not None and not 1 <= size <= STORED_SIZE:
        raise InputError(
            f"emoji can't be loaded at size {size}; the size must be from 1 to the stored "
            f"{STORED_SIZE}."
        )
    filters = None if split is None else [("split", "==", split)]
    columns = ["caption", "emoji", "group", "base", "skin_tone", "gender", "split"]
    if size is not None:
        columns.append("image")
    parquet = need("pyarrow.parquet")
    table = parquet.read_table(FILE, columns=columns, filters=filters).to_pydict()
    return Emoji(
        images=None if size is None else _decode(table["image"], size),
        captions=table["caption"],
        characters=table["emoji"],
        groups=table["group"],
        bases=table["base"],
        skin_tones=table["skin_tone"],
        genders=table["gender"],
        splits=table["split"],
    )


def _decode(images: list[dict], size: int) -> Tensor:
    """Encoded pictures to one uint8 tensor, (count, 3, size, size)."""
    import numpy as np
    import torch
    from PIL import Image

    # Whole pixels average exactly; other sizes need a filter that knows about fractions.
    exact = STORED_SIZE % size == 0
    resample = Image.Resampling.BOX if exact else Image.Resampling.LANCZOS
    pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for row, stored in zip(pixels, images, strict=True):
        with Image.open(io.BytesIO(stored["bytes"])) as image:
            row[:] = np.asarray(image.convert("RGB").resize((size, size), resample))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
