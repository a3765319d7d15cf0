"""A folder of images: captions in `metadata.jsonl`, or in a .txt file beside each image."""

import json
import os
from pathlib import Path

from pared.errors import InputError
from pared.worlds.readers.items import Raw, Unusable, caption_in

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


def holds_captions(folder: Path) -> bool:
    """Whether a folder holds images with captions beside them, whatever else lies there."""
    if any(folder.rglob("metadata.jsonl")):
        return True
    texts = (path for path in folder.rglob("*.txt") if not path.name.startswith("."))
    return any(path.with_suffix(suffix).is_file() for path in texts for suffix in SUFFIXES)


def read_folder(
    folder: Path, image_column: str | None = None, caption_column: str | None = None
) -> list[Raw]:
    """The images of a folder and its subfolders, by name; hidden files are passed over.

    A `metadata.jsonl`, as `datasets`' ImageFolder defines it, names files relative to its own
    folder.
    """
    folder = Path(os.path.normpath(folder))  # so that listed and found paths compare
    files = files_in(folder)
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    metadata = [path for path in files if path.name == "metadata.jsonl"]
    if not images:
        raise InputError(
            f"the folder {str(folder)!r} holds no images; expected files like .jpg, .png or .webp "
            "with captions in metadata.jsonl or in .txt files of the same names."
        )
    if not metadata:
        if image_column or caption_column:
            raise InputError(
                f"the folder {str(folder)!r} has no metadata.jsonl to take columns from; "
                "add one, or leave image_column and caption_column out."
            )
        return [_with_sidecar(path, folder) for path in images]

    listed = []
    for path in metadata:
        listed += _listed(path, folder, image_column or "file_name", caption_column)
    named = {raw.image for raw in listed}
    unlisted = [path for path in images if path not in named]
    return listed + [
        Raw(_key(path, folder), path, fault="not listed in metadata.jsonl") for path in unlisted
    ]


def _listed(
    metadata: Path, folder: Path, image_column: str, caption_column: str | None
) -> list[Raw]:
    """The items that one `metadata.jsonl` lists."""
    listed = []
    for number, line in lines_of(metadata):
        try:
            entry = json.loads(line)
            path = Path(os.path.normpath(metadata.parent / entry[image_column]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"line {number} of {str(metadata)!r} is {line[:60]!r}; each line must be a JSON "
                f'object like {{"{image_column}": "cat.png", "text": "a cat"}}.'
            ) from error
        try:
            listed.append(Raw(_key(path, folder), path, caption_in(entry, caption_column)))
        except Unusable as fault:
            listed.append(Raw(_key(path, folder), path, fault=str(fault)))
    return listed


def _with_sidecar(path: Path, folder: Path) -> Raw:
    sidecar = path.with_suffix(".txt")
    if not sidecar.is_file():
        return Raw(_key(path, folder), path, fault=f"no caption: {sidecar.name} is missing")
    try:
        return Raw(_key(path, folder), path, _text(sidecar))
    except UnicodeDecodeError:
        return Raw(_key(path, folder), path, fault=f"no caption: {sidecar.name} isn't UTF-8 text")


def files_in(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders, by name, without the hidden ones."""
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder)
    )


def lines_of(metadata: Path) -> list[tuple[int, str]]:
    """The lines of a file that aren't empty, with their numbers.

    Raises:
        InputError: it isn't UTF-8 text.
    """
    try:
        # Not splitlines(), which also splits at marks that JSON allows within a string.
        lines = _text(metadata).split("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(metadata)!r} isn't UTF-8 text; save it in that encoding."
        ) from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # drops the mark that some editors put in front


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
