"""Readers for users' own triplets: a picture before, what to do, the picture after.

    >>> from pared.worlds.readers.triplets import read_triplets
    >>> examples = read_triplets("photos/", size=64, on_bad="skip")

Or a picture, a mask, and a text: then what the mask marks is blanked in the picture that is given,
and the picture itself is wanted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import InputError
from pared.worlds import tasks
from pared.worlds.optional import need
from pared.worlds.readers.folder import SUFFIXES, files_in, lines_of
from pared.worlds.readers.items import Unusable, decode, report
from pared.worlds.readers.table import holds_tables, load, only_split
from pared.worlds.tasks import Examples

if TYPE_CHECKING:
    from PIL import Image

# Columns for before, text and after: InstructPix2Pix's, those of its small sample, MagicBrush's.
COLUMNS = (
    ("original_image", "edit_prompt", "edited_image"),
    ("input_image", "edit_prompt", "edited_image"),
    ("source_img", "instruction", "target_img"),
    ("before", "text", "after"),
)
CAPTIONS = ("original_prompt", "edited_prompt")
LINE = '{"before": "a.png", "after": "b.png", "text": "make it green"}'
BLANK = (128, 128, 128)

Stored = bytes | Path | None


@dataclass(frozen=True)
class Raw:
    """A triplet as found: not yet decoded, perhaps unusable.

    Attributes:
        key: its name.
        before: the encoded picture or the file that holds it.
        after: likewise.
        text: as found.
        mask: of what is blanked in `after`, where there is no `before`.
        captions: of before and after, where known.
        fault: what is already known to be wrong with it.
    """

    key: str
    before: Stored = None
    after: Stored = None
    text: Any = None
    mask: Stored = None
    captions: tuple[str, str] | None = None
    fault: str = ""

    def pictures(self, size: int) -> tuple[Image.Image, Image.Image]:
        """Both pictures' middle squares, in RGB.

        Raises:
            Unusable: something is missing, unreadable, or doesn't fit together.
        """
        if self.fault:
            raise Unusable(self.fault)
        if not isinstance(self.text, str) or not self.text.strip():
            raise Unusable("no instruction")
        after = _decoded(self.after, "after" if self.mask is None else "image")
        if self.mask is not None:
            return _blanked(after, _decoded(self.mask, "mask", "black"), size), _square(after, size)
        before = _decoded(self.before, "before")
        if before.size != after.size:
            raise Unusable(f"{_pixels(before)} pixels before but {_pixels(after)} after")
        return _square(before, size), _square(after, size)


def read_triplets(
    source: str | Path, size: int, on_bad: str = "refuse", task: str | None = None
) -> Examples:
    """Examples of a task from wherever they are, cut to middle squares.

    Args:
        source: one of
            - a folder of images with a `metadata.jsonl` whose lines name the files "before" and
              "after" and the "text", and perhaps "caption_before" and "caption_after"; or
              "image", "mask" (white where something is to be filled in) and "text";
            - InstructPix2Pix: a folder of folders with `prompt.json`, `SEED_0.jpg` and
              `SEED_1.jpg`; `seeds.json` beside them says which seeds, if it's there;
            - GQA-Inpaint: its folder with `images`, `images_inpainted` and `train_scenes.json`, or
              one of its .json files of scenes or of instructions;
            - a dataset as `pared.worlds.readers.read` takes it, with the columns original_image,
              edit_prompt, edited_image, or others of `COLUMNS`.
        size: height and width of the pictures.
        on_bad: what to do with triplets that can't be used: "refuse" all, or "skip" those with one
            warning that names them.
        task: whose examples they are; by default "inpaint" for masks and GQA-Inpaint, else "edit".

    Raises:
        InputError: the source isn't there, holds no triplets, or holds bad ones that are to be
            refused; or a needed package is missing.
    """
    if on_bad not in ("refuse", "skip"):
        raise InputError(f"on_bad can't be {on_bad!r}; it is 'refuse' or 'skip'.")
    if size < 1:
        raise InputError(f"pictures can't be read at size {size}; the size must be at least 1.")
    path = Path(source).expanduser()
    usual = "edit"
    raws: Iterable[Raw]
    if (path.suffix == ".json" and not path.is_dir()) or (path / "images_inpainted").is_dir():
        raws, usual = _inpainted(path), "inpaint"
    elif (path / "metadata.jsonl").is_file():
        raws = _listed(path)
        usual = "inpaint" if any(raw.mask is not None for raw in raws) else "edit"
    elif (path / "seeds.json").is_file() or any(path.glob("*/prompt.json")):
        raws = _prompted(path)
    elif path.is_dir() and not holds_tables(path):
        raise InputError(
            f"the folder {str(source)!r} holds no triplets; expected a metadata.jsonl with lines "
            f"like {LINE}, or folders with prompt.json, or tables."
        )
    else:
        raws = _rows(str(source))
    return _examples(str(source), raws, size, on_bad, tasks.get(task or usual).name)


def _examples(source: str, raws: Iterable[Raw], size: int, on_bad: str, task: str) -> Examples:
    """The usable triplets; a picture that occurs several times is held once."""
    import numpy as np
    import torch

    pixels: list[np.ndarray] = []
    places: dict[bytes, int] = {}

    def place(picture: Image.Image) -> int:
        array = np.asarray(picture)
        digest = hashlib.sha256(array.tobytes()).digest()
        if digest not in places:
            places[digest] = len(pixels)
            pixels.append(array)
        return places[digest]

    faults, before, after, kept = [], [], [], []
    for raw in raws:
        try:
            pictures = raw.pictures(size)
        except Unusable as fault:
            faults.append(f"{raw.key} ({fault})")
            continue
        before.append(place(pictures[0]))
        after.append(place(pictures[1]))
        kept.append(raw)
    count = len(kept) + len(faults)
    if not count:
        raise InputError(f"{source!r} holds no triplets; give a source of pictures and texts.")
    if faults:
        report(source, faults, count, on_bad, "two pictures of one size and an instruction")
    captions = [raw.captions for raw in kept if raw.captions is not None]
    return Examples(
        task,
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
        before,
        after,
        [raw.text.strip() for raw in kept],
        captions if len(captions) == len(kept) else None,
    )


# Pictures -----------------------------------------------------------------------------------------


def _decoded(stored: Stored, name: str, ground: str = "white") -> Image.Image:
    if stored is None:
        raise Unusable(f"no {name}")
    try:
        return decode(stored, ground)
    except Unusable as fault:
        raise Unusable(f"{name}: {fault}") from fault


def _square(image: Image.Image, size: int) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.fit(image, (size, size))


def _blanked(image: Image.Image, mask: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, grey where the mask is white."""
    if mask.size != image.size:
        raise Unusable(f"the mask is {_pixels(mask)} pixels, the image {_pixels(image)}")
    mask = _square(mask.convert("L"), size)
    if mask.point(_whiter).getbbox() is None:
        raise Unusable("the mask marks nothing in white")
    return blanked(_square(image, size), mask)


def blanked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """An image in RGB, grey where a mask is white; the mask is brought to its size."""
    from PIL import Image

    marked = mask.convert("L").resize(image.size).point(_whiter)
    return Image.composite(Image.new("RGB", image.size, BLANK), image, marked)


def _whiter(level: int) -> int:
    return 255 if level > 127 else 0


def _pixels(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


# Layouts ------------------------------------------------------------------------------------------


def _listed(folder: Path) -> list[Raw]:
    """The triplets that a folder's `metadata.jsonl` lists."""
    folder = Path(os.path.normpath(folder))
    raws, named = [], set()
    for number, line in lines_of(folder / "metadata.jsonl"):
        try:
            entry = json.loads(line)
            masked = "mask" in entry
            files = [entry[name] for name in (("image", "mask") if masked else ("before", "after"))]
            first, second = (Path(os.path.normpath(folder / name)) for name in files)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"line {number} of {str(folder / 'metadata.jsonl')!r} is {line[:60]!r}; each line "
                f'must be a JSON object like {LINE}, or with "image" and "mask".'
            ) from error
        named |= {first, second}
        key, text = f"line {number} {files[0]}", entry.get("text")
        if masked:
            raws.append(Raw(key, after=first, mask=second, text=text))
        else:
            captions = _both(entry, ("caption_before", "caption_after"))
            raws.append(Raw(key, first, second, text, captions=captions))
    unlisted = [p for p in files_in(folder) if p.suffix.lower() in SUFFIXES and p not in named]
    return raws + [
        Raw(p.relative_to(folder).as_posix(), fault="not listed in metadata.jsonl")
        for p in unlisted
    ]


def _prompted(folder: Path) -> Iterator[Raw]:
    """InstructPix2Pix: one folder for each prompt, with a pair of pictures for each seed."""
    if (folder / "seeds.json").is_file():
        chosen = _seeds(folder / "seeds.json")
    else:
        homes = sorted(prompt.parent for prompt in folder.glob("*/prompt.json"))
        chosen = [
            (home, sorted(p.name.removesuffix("_0.jpg") for p in home.glob("*_0.jpg")))
            for home in homes
        ]
    for home, seeds in chosen:
        try:
            prompt = json.loads((home / "prompt.json").read_text(encoding="utf-8"))
            text, captions = prompt.get("edit"), _both(prompt, ("input", "output"))
        except (OSError, ValueError, AttributeError):
            yield Raw(f"{home.name}/prompt.json", fault="no instruction: it can't be read")
            continue
        for seed in seeds:
            before, after = (home / f"{seed}_{which}.jpg" for which in (0, 1))
            yield Raw(f"{home.name}/{seed}", before, after, text, captions=captions)


def _seeds(file: Path) -> list[tuple[Path, list]]:
    """The folders that a `seeds.json` lists, and the seeds of each."""
    example = '[["0000000", ["1234", "5678"]]]'
    try:
        return [(file.parent / name, list(seeds)) for name, seeds in _json(file, list, example)]
    except (ValueError, TypeError) as error:
        raise InputError(f"{str(file)!r} must hold pairs like {example}.") from error


def _inpainted(source: Path) -> Iterator[Raw]:
    """GQA-Inpaint: objects of a picture, each with a picture without it.

    Files of instructions give a text for "iPICTURE-oOBJECT". From files of scenes the text is made:
    "remove the cup"; or, where two of that name are at different sides, "... at the left". Objects
    that these words don't single out are not taken, as in the data set's own loader. Its random
    attributes and relations to other objects are left out.
    """
    file = source / "train_scenes.json" if source.is_dir() else source
    example = '{"i2370799-o123": "remove the cup"}'
    texts = {}
    for name, entry in _json(file, dict, example).items():
        if isinstance(entry, str):
            image, _, thing = name.removeprefix("i").partition("-o")
            texts[image, thing] = entry
            continue
        try:
            texts |= {(name, thing): text for thing, text in _removals(entry)}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"the entry {name!r} of {str(file)!r} is no scene, which has named objects."
            ) from error
    root = file.parent
    for (image, thing), text in texts.items():
        without = root / "images_inpainted" / image / f"{thing}.jpg"
        yield Raw(f"i{image}-o{thing}", root / "images" / f"{image}.jpg", without, text)


def _removals(scene: dict) -> Iterator[tuple[str, str]]:
    """Objects of a scene that have a picture without them, and what asks for their removal."""
    things = scene["objects"]
    sides = scene.get("image_relative_positions", {})
    for thing, about in things.items():
        namesakes = [other for other in things if things[other]["name"] == about["name"]]
        own = sides.get(thing, "")
        single = len(namesakes) == 1
        apart = len(namesakes) == 2 and len({sides.get(other) for other in namesakes}) == 2
        if about.get("bidirected") and (single or apart):
            place = "" if single else f" {own.replace('to the', 'at the')}"
            yield thing, f"remove the {about['name']}{place}"


def _rows(source: str) -> Iterator[Raw]:
    """The rows of a dataset's split "train", or of its only split."""
    dataset = only_split(source, load(source))
    columns = next((names for names in COLUMNS if {*names} <= {*dataset.column_names}), None)
    if columns is None:
        raise InputError(
            f"{source!r} has the columns {', '.join(dataset.column_names)}; triplets need "
            f"{', '.join(COLUMNS[0])}, or {', '.join(COLUMNS[-1])}."
        )
    first, text, second = columns
    # Undecoded, so that a broken image is an item to report and not an exception on the way.
    for name in (first, second):
        dataset = dataset.cast_column(name, need("datasets").Image(decode=False))
    kept = [name for name in dataset.column_names if name in (*columns, *CAPTIONS)]
    for number, row in enumerate(dataset.select_columns(kept)):
        pair = _stored(row[first]), _stored(row[second])
        yield Raw(f"row {number}", *pair, row[text], captions=_both(row, CAPTIONS))


def _stored(cell: dict | None) -> Stored:
    cell = cell or {}
    return cell.get("bytes") or (Path(cell["path"]) if cell.get("path") else None)


def _both(entry: dict, names: tuple[str, str]) -> tuple[str, str] | None:
    """Two texts of an entry, if it has both."""
    first, second = (entry.get(name) for name in names)
    return (first, second) if isinstance(first, str) and isinstance(second, str) else None


def _json(file: Path, kind: type, example: str) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"there is no file {str(file)!r}; it says which triplets there are."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} can't be read; it must be JSON like {example}.") from error
    if not isinstance(content, kind):
        raise InputError(f"{str(file)!r} is no JSON like {example}; mend it or remove it.")
    return content
