"""Readers for users' own captioned images, whatever they lie in.

    >>> from pared.worlds.readers import read
    >>> for item in read("photos/", on_bad="skip"):
    ...     item.image, item.caption, item.key

A folder of images, a `datasets` name or path, and WebDataset shards all give the same items.
Nothing is left out in silence: what can't be used is refused, or skipped with a warning, by name.
"""

from collections.abc import Iterable
from pathlib import Path

from pared.errors import InputError
from pared.worlds.readers.folder import holds_captions, read_folder
from pared.worlds.readers.items import Item, Items, Raw
from pared.worlds.readers.shards import holds_shards, read_shards
from pared.worlds.readers.table import holds_tables, read_table

__all__ = ["Item", "Items", "read"]


def read(
    source: str | Path,
    on_bad: str = "refuse",
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Items:
    """Captioned images from wherever they are.

    Every image is decoded once before this returns, so that what is broken comes to light before
    any work starts; iterating decodes again and holds one image at a time.

    Args:
        source: one of
            - a folder of images with captions in `metadata.jsonl` (as `datasets`' ImageFolder has
              it) or in a .txt file beside each image;
            - WebDataset shards: a .tar file, a folder of them, or a pattern like
              `shards/{000..007}.tar`;
            - a dataset: its name on the hub, a folder written by `save_to_disk`, a folder of
              parquet, or one .parquet file.
        on_bad: what to do with items that have no caption or no readable image: "refuse" all, or
            "skip" those with one warning that names them.
        image_column: where the images are, if not found by itself: a dataset's column, the key of
            the file name in `metadata.jsonl`, the file extension in shards.
        caption_column: where the captions are, if not found by itself: a dataset's column, or a key
            in `metadata.jsonl` or in the shards' .json files.

    Raises:
        InputError: the source isn't there, holds no captioned images, or holds bad items that are
            to be refused; or a needed package is missing.
    """
    if on_bad not in ("refuse", "skip"):
        raise InputError(f"on_bad can't be {on_bad!r}; it is 'refuse' or 'skip'.")
    path = Path(source).expanduser()
    raws: Iterable[Raw]
    if path.suffix == ".tar" or holds_shards(path):
        raws = read_shards(path, image_column, caption_column)
    elif path.is_dir() and (holds_captions(path) or not holds_tables(path)):
        raws = read_folder(path, image_column, caption_column)
    else:
        raws = read_table(str(source), image_column, caption_column)
    return Items(str(source), raws, on_bad)
