"""Writing pictures: names from prompts, whole files or none, and a sheet of all."""

import os
import re
import tempfile
from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path

from PIL import Image

from pared.errors import InputError

SHEET = "sheet.png"
GAP = 4


def file_names(prompts: Sequence[str]) -> list[str]:
    """One name per prompt, in order: `02-a-red-fox.png`."""
    digits = max(2, len(str(len(prompts))))
    return [f"{i:0{digits}}-{_words(prompt)}.png" for i, prompt in enumerate(prompts, start=1)]


def _words(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower())[:40].strip("-_") or "picture"


def save(image: Image.Image, path: Path) -> Path:
    """Write a PNG under another name beside, then rename it: never half a picture.

    Raises:
        InputError: the place can't be written or the disk is full; an older file stays.
    """
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            image.save(file, format="PNG")
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except OSError as error:
        if beside is not None:
            Path(beside).unlink(missing_ok=True)
        raise InputError(f"{path} could not be written ({error.strerror or error}).") from None
    return path


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All pictures on one, in reading order on white, in about as many rows as columns."""
    columns = ceil(sqrt(len(images)))
    rows = ceil(len(images) / columns)
    width = max(image.width for image in images) + GAP
    height = max(image.height for image in images) + GAP
    page = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        page.paste(image.convert("RGB"), (column * width + GAP, row * height + GAP))
    return page
