"""Datasets of the Hugging Face `datasets` library: by hub name, or as saved on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import InputError
from pared.worlds.optional import need
from pared.worlds.readers.items import Raw

if TYPE_CHECKING:
    from datasets import Dataset

SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves in its folder


def holds_tables(folder: Path) -> bool:
    """Whether a folder holds what `save_to_disk` writes, or parquet files."""
    return any((folder / name).is_file() for name in SAVED) or any(folder.rglob("*.parquet"))


def read_table(
    source: str, image_column: str | None = None, caption_column: str | None = None
) -> Table:
    """The rows of a dataset: of its split "train", or of its only split."""
    dataset = only_split(source, load(source))
    image_column = _image_column(source, dataset, image_column)
    caption_column = _caption_column(source, dataset, caption_column)
    # Undecoded, so that a broken image is an item to report and not an exception on the way.
    image = need("datasets").Image(decode=False)
    dataset = dataset.select_columns([image_column, caption_column])
    return Table(dataset.cast_column(image_column, image), image_column, caption_column)


@dataclass(frozen=True)
class Table:
    """A dataset's rows as items."""

    dataset: Dataset
    image_column: str
    caption_column: str

    def __iter__(self) -> Iterator[Raw]:
        for number, row in enumerate(self.dataset):
            yield self._raw(number, row)

    def __getitem__(self, number: int) -> Raw:
        return self._raw(number, self.dataset[number])

    def _raw(self, number: int, row: dict) -> Raw:
        stored = row[self.image_column] or {}
        path = stored.get("path")
        image = stored.get("bytes") or (Path(path) if path else None)
        name = f"row {number}" + (f" {Path(path).name}" if path else "")
        return Raw(name, image, row[self.caption_column])


def load(source: str) -> Any:
    """A dataset, or its splits, by hub name or from where it is saved.

    Raises:
        InputError: it can't be loaded.
    """
    datasets = need("datasets")
    path = Path(source).expanduser()
    if not path.exists() and (source.startswith((".", "/", "~")) or path.suffix):
        raise InputError(f"there is no file or folder {source!r}; give one that exists.")
    if path.is_file() and path.suffix != ".parquet":
        raise InputError(
            f"the file {source!r} is no source of images; give a folder, a dataset, a .parquet "
            "file or .tar shards."
        )
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path))
        if any((path / name).is_file() for name in SAVED):
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path) if path.is_dir() else source)
    except Exception as error:  # the library and the network below it raise many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{source!r} can't be loaded as a dataset ({reason[0]}); give a path that exists, or "
            "the name of a dataset that can be reached."
        ) from error


def only_split(source: str, loaded: Any) -> Dataset:
    """The split "train" of what was loaded, or the only one.

    Raises:
        InputError: there are several and none is "train".
    """
    if not isinstance(loaded, dict):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise InputError(
        f"the dataset {source!r} has the splits {', '.join(loaded)}; it must have a split 'train' "
        "or only one, so save the one you want with save_to_disk and give that folder."
    )


def _image_column(source: str, dataset: Dataset, given: str | None) -> str:
    if given:
        return present(source, dataset, given)
    image = need("datasets").Image
    found = [name for name, feature in dataset.features.items() if isinstance(feature, image)]
    return choose(source, dataset, found, ("image",), "image")


def _caption_column(source: str, dataset: Dataset, given: str | None) -> str:
    strings = [
        name
        for name, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if given and present(source, dataset, given) not in strings:
        raise InputError(
            f"the column {given!r} of {source!r} is no text; its text columns are: "
            f"{', '.join(strings) or 'none'}."
        )
    return given or choose(source, dataset, strings, ("text", "caption"), "caption")


def present(source: str, dataset: Dataset, column: str) -> str:
    """A column that was asked for, if it is there."""
    if column not in dataset.column_names:
        raise InputError(
            f"{source!r} has no column {column!r}; its columns are: "
            f"{', '.join(dataset.column_names)}."
        )
    return column


def choose(
    source: str, dataset: Dataset, found: list[str], usual: tuple[str, ...], kind: str
) -> str:
    """The only column that fits, or the one with the usual name."""
    for name in usual:
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    raise InputError(
        f"can't tell which column of {source!r} is the {kind}; name one of its columns "
        f"({', '.join(dataset.column_names)}) as {kind}_column."
    )
