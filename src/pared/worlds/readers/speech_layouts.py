"""Where the recordings of known corpora lie, what is said in them, and who says it."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pared.errors import InputError
from pared.worlds.optional import need
from pared.worlds.readers.folder import files_in, lines_of
from pared.worlds.readers.table import choose, load, only_split, present

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}
SIDES = ("clean", "noise", "noisy")
SPEAKER_COLUMNS = ("speaker_id", "client_id", "speaker")
TRANSCRIPT_COLUMNS = ("text", "sentence", "transcript", "transcription")

# "..._reader_06709_..." of the read speech, "p225_001" of VCTK.
_SPEAKER = re.compile(r"(reader_\d+|\bp\d{3}(?=_))")
_FILE_ID = re.compile(r"fileid_(\d+)")


@dataclass(frozen=True)
class Recording:
    """A recording as found.

    Attributes:
        key: its name within the source.
        content: gives the file, or what would be in it.
        transcript: what is said, if known.
        speaker: who says it, if known.
        fault: what is wrong with it, as the end of a sentence that begins with its name.
        frames: samples at its own rate, once it has been examined.
        rate: its own, once it has been examined.
    """

    key: str
    content: Callable[[], Path | bytes]
    transcript: str | None = None
    speaker: str | None = None
    fault: str = ""
    frames: int = 0
    rate: int = 0


def is_librispeech(folder: Path) -> bool:
    """Whether transcripts of LibriSpeech's form lie anywhere in a folder."""
    return any(folder.rglob("*.trans.txt"))


def librispeech(folder: Path, split: str | None) -> list[Recording]:
    """LibriSpeech: `PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac`, with one `*.trans.txt` each.

    Raises:
        InputError: there is no such part.
    """
    part = folder / (split or "")
    if not part.is_dir() or not is_librispeech(part):
        parts = sorted(one.name for one in folder.iterdir() if one.is_dir())
        raise InputError(
            f"{str(folder)!r} has no transcripts in a part {split!r}; its folders are "
            f"{', '.join(parts)}."
        )
    found = []
    for listing in sorted(part.rglob("*.trans.txt")):
        beside = {one.stem: one for one in _sounds(listing.parent)}
        for number, line in lines_of(listing):
            name, _, words = line.strip().partition(" ")
            path = beside.pop(name, listing.parent / f"{name}.flac")
            fault = "" if words else f"has no words in line {number} of {listing.name}"
            found.append(_recording(path, folder, words or None, name.split("-")[0], fault))
        unlisted = f"isn't listed in {listing.name}"
        found += [_recording(path, folder, fault=unlisted) for path in beside.values()]
    return found


def is_common_voice(folder: Path) -> bool:
    """Whether a folder holds clips and lists of them."""
    return (folder / "clips").is_dir() and any(folder.glob("*.tsv"))


def common_voice(folder: Path, split: str | None) -> list[Recording]:
    """Common Voice: files in `clips`, and tables with the columns path, sentence and client_id.

    Raises:
        InputError: there is no such table, or it has other columns.
    """
    listing = folder / f"{split or 'train'}.tsv"
    if not listing.is_file():
        known = ", ".join(sorted(one.stem for one in folder.glob("*.tsv")))
        raise InputError(f"{str(folder)!r} has no table {listing.name!r}; the splits are {known}.")
    lines = [line for _, line in lines_of(listing)]
    # Quotation marks stand in sentences as they are.
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    if not {"path", "sentence"} <= set(rows.fieldnames or ()):
        raise InputError(
            f"{str(listing)!r} has the columns {', '.join(rows.fieldnames or ())}; it needs path "
            "and sentence."
        )
    found = []
    for row in rows:
        words, name = (row["sentence"] or "").strip(), row["path"] or ""
        fault = "" if words else f"has no sentence in {listing.name}"
        path = folder / "clips" / (name if Path(name).suffix else f"{name}.mp3")
        found.append(_recording(path, folder, words or None, row.get("client_id"), fault))
    return found


def table(
    source: str, split: str | None, audio_column: str | None, transcript_column: str | None
) -> list[Recording]:
    """The rows of a dataset.

    Raises:
        InputError: it can't be loaded, has no such split, or its columns can't be told.
    """
    dataset = _split_of(source, load(source), split)
    features = dataset.features.items()
    audio = need("datasets").Audio
    sounds = [name for name, feature in features if isinstance(feature, audio)]
    strings = [
        name for name, feature in features
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]  # fmt: skip
    sound = _column(source, dataset, audio_column, sounds, ("audio",), "audio")
    words = _column(source, dataset, transcript_column, strings, TRANSCRIPT_COLUMNS, "transcript")
    speaker = next((name for name in SPEAKER_COLUMNS if name in dataset.column_names), None)
    # Undecoded: `datasets` would need torchcodec, and a broken row is to be told by its name.
    stored = dataset.select_columns([sound]).cast_column(sound, audio(decode=False))
    told = dataset.select_columns([words, *([speaker] if speaker else [])])
    return [_row(number, row, stored, sound, words, speaker) for number, row in enumerate(told)]


def _column(
    source: str,
    dataset: Dataset,
    given: str | None,
    found: list[str],
    usual: tuple[str, ...],
    kind: str,
) -> str:
    return present(source, dataset, given) if given else choose(source, dataset, found, usual, kind)


def _row(
    number: int, row: dict, stored: Dataset, sound: str, words: str, speaker: str | None
) -> Recording:
    def content() -> Path | bytes:
        cell = stored[number][sound] or {}
        return cell.get("bytes") or Path(cell.get("path") or "")

    transcript = (row[words] or "").strip()
    return Recording(
        key=f"row {number}",
        content=content,
        transcript=transcript or None,
        speaker=None if speaker is None or row[speaker] is None else str(row[speaker]),
        fault="" if transcript else f"has no {words}",
    )


def _split_of(source: str, loaded, split: str | None) -> Dataset:
    if split is None:
        return only_split(source, loaded)
    if not isinstance(loaded, dict) or split not in loaded:
        known = ", ".join(loaded) if isinstance(loaded, dict) else "none, it is one table"
        raise InputError(f"the dataset {source!r} has no split {split!r}; its splits are: {known}.")
    return loaded[split]


def challenge(folder: Path) -> tuple[list[Recording], list[Recording], list[Recording]]:
    """The DNS challenge's clean speech, noise, and noisy speech in the order of the clean.

    Raises:
        InputError: there is no such folder, or no clean speech and no noise or noisy speech in it.
    """
    sides = _sides(folder)
    if not sides["clean"] or not (sides["noise"] or sides["noisy"]):
        held = ", ".join(side for side, paths in sides.items() if paths) or "neither"
        raise InputError(
            f"{str(folder)!r} has recordings in {held} of the folders clean, noise and noisy; it "
            "needs clean, and noise or noisy."
        )
    noise = [_recording(path, folder) for path in sides["noise"]]
    if not sides["noisy"]:
        return [_spoken(path, folder) for path in sides["clean"]], noise, []
    pairs = _pairs(sides["clean"], sides["noisy"], folder)
    noisy = [_recording(path, folder) for _, path in pairs]
    return [_spoken(path, folder) for path, _ in pairs], noise, noisy


def noises(folder: Path) -> list[Recording]:
    """The DNS challenge's noises alone; or every recording of a folder that has no such sides.

    Raises:
        InputError: there is no such folder, or no noise in it.
    """
    sides = _sides(folder)
    found = sides["noise"] if any(sides.values()) else _sounds(folder)
    if not found:
        held = " and ".join(side for side, paths in sides.items() if paths)
        raise InputError(
            f"{str(folder)!r} holds {f'{held} speech alone' if held else 'no recordings'}; give a "
            "folder of noises, or one with a folder noise as the DNS challenge has it."
        )
    return [_recording(path, folder) for path in found]


def _sides(folder: Path) -> dict[str, list[Path]]:
    """The recordings of each side of the DNS challenge."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}; give one that exists.")
    sides: dict[str, list[Path]] = {side: [] for side in SIDES}
    for path in _sounds(folder):
        parents = path.relative_to(folder).parts[:-1]
        if side := next(filter(None, map(_side, parents)), None):
            sides[side].append(path)
    return sides


def _pairs(clean: list[Path], noisy: list[Path], folder: Path) -> list[tuple[Path, Path]]:
    """Clean and noisy files that belong together, in the order of the noisy ones."""
    by_key, other = ({_pair_key(path, folder): path for path in side} for side in (clean, noisy))
    lonely = [path for key, path in (other | by_key).items() if (key in other) != (key in by_key)]
    if lonely or not len(clean) == len(noisy) == len(by_key):
        example = f" ({_key(lonely[0], folder)} has no other side)" if lonely else ""
        raise InputError(
            f"{len(clean)} clean and {len(noisy)} noisy files in {str(folder)!r} don't pair up"
            f"{example}; give both sides of a pair, and no others, the same name "
            "or the same fileid_N."
        )
    return [(by_key[key], path) for key, path in other.items()]


def _pair_key(path: Path, folder: Path) -> tuple[str, ...]:
    """What both sides of a pair share: the folders around the side's own, and a number or name."""
    *parents, name = path.relative_to(folder).parts
    parents.remove(next(filter(_side, parents)))
    number = _FILE_ID.search(name)
    return (*parents, number[0] if number else path.stem)


def _side(folder: str) -> str | None:
    """The side that a folder's name tells: "noise" of "noise_fullband"."""
    first = re.split("[_-]", folder.lower())[0]
    return first if first in SIDES else None


def _spoken(path: Path, folder: Path) -> Recording:
    found = _SPEAKER.search(path.name)
    return _recording(path, folder, speaker=found[0] if found else path.parent.name)


def _sounds(folder: Path) -> list[Path]:
    return [path for path in files_in(folder) if path.suffix.lower() in SUFFIXES]


def _recording(
    path: Path,
    folder: Path,
    transcript: str | None = None,
    speaker: str | None = None,
    fault: str = "",
) -> Recording:
    return Recording(_key(path, folder), lambda: path, transcript, speaker or None, fault)


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
