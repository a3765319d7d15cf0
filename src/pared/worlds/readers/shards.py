"""WebDataset shards: .tar files in which an image and its caption share a name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pared.errors import InputError
from pared.worlds.optional import need
from pared.worlds.readers.items import Raw, Unusable, caption_in

EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds .tar files."""
    return folder.is_dir() and any(folder.glob("*.tar"))


def read_shards(
    source: Path, image_column: str | None = None, caption_column: str | None = None
) -> Shards:
    """The samples of one shard, of a folder of shards, or of a pattern like `{000..007}.tar`.

    Captions are in .txt, or under a key of .json.
    """
    need("webdataset")
    shards = sorted(source.glob("*.tar")) if source.is_dir() else _expand(source)
    return Shards(shards, (image_column,) if image_column else EXTENSIONS, caption_column)


@dataclass(frozen=True)
class Shards:
    """The samples of some shards as items; reads the files anew on each iteration."""

    shards: list[Path]
    extensions: tuple[str, ...]
    caption_column: str | None

    def __iter__(self) -> Iterator[Raw]:
        for shard in self.shards:
            try:
                for sample in _samples(shard):
                    yield self._raw(sample, f"{shard.name}/{sample['__key__']}")
            except Exception:  # of tarfile, zlib or webdataset; the rest of the shard is lost
                yield Raw(shard.name, fault="the file is broken, or no .tar of samples")

    def _raw(self, sample: dict, key: str) -> Raw:
        image = next((sample[name] for name in self.extensions if name in sample), None)
        try:
            return Raw(key, image, self._caption(sample))
        except Unusable as fault:
            return Raw(key, fault=str(fault))

    def _caption(self, sample: dict) -> str | None:
        try:
            if "txt" in sample and not self.caption_column:
                return sample["txt"].decode()
            entry = json.loads(sample["json"]) if "json" in sample else None
        except ValueError as error:  # of the encoding or of JSON
            raise Unusable("the caption can't be read") from error
        return caption_in(entry, self.caption_column) if isinstance(entry, dict) else None


def _expand(pattern: Path) -> list[Path]:
    """The shards that a path stands for, which may have braces."""
    shards = [Path(name) for name in need("braceexpand").braceexpand(str(pattern))]
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"there is no shard {str(shard)!r}; give .tar files that exist.")
    return shards


def _samples(shard: Path) -> Iterator[dict]:
    """The grouped members of one shard: {"__key__": ..., extension: bytes}."""
    tariterators = need("webdataset").tariterators
    with shard.open("rb") as stream:
        # An open file rather than its name, which webdataset would take for a URL or a command.
        source = [{"url": str(shard), "stream": stream}]
        yield from tariterators.group_by_keys(tariterators.tar_file_expander(source))
