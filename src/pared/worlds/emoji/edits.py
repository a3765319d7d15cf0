"""What the tasks are learnt from, made of the emoji world: every target is exact.

    >>> from pared.worlds.emoji.edits import edits
    >>> examples = edits(size=64, split="train", count=3000)
    >>> examples.texts[0]
    'make the skin tone dark'

Everything is a function of the seed. "heldout" is as `pared.worlds.emoji.pairs` has it: an example
that touches a held-out row on either side; the training examples touch none.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pared.errors import InputError
from pared.worlds.emoji import pixels
from pared.worlds.emoji.pairs import pairs
from pared.worlds.emoji.world import SPLITS, Emoji, load
from pared.worlds.tasks import UPSCALING, Examples

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NEAR = ("skin_tone", "gender", "recolour")
KINDS = (*NEAR, *pixels.FAR)

# An edit that changes the mean pixel by less than this, of 255, is none: a white heart made green.
VISIBLE = 4.0
# Side of what is pasted, as a share of the picture's; tries to place it on something; and how much
# of it must lie there.
PASTED = (0.35, 0.55)
PLACES = 12
COVERED = (0.3, 0.8)


@dataclass(frozen=True)
class _Edit:
    """Row before, row after or the picture itself, instruction, captions."""

    before: int
    after: int | Tensor
    text: str
    captions: tuple[str, str]


def edits(
    size: int = 64,
    split: str | None = None,
    count: int = 4096,
    seed: int = 0,
    kinds: Sequence[str] = NEAR,
) -> Examples:
    """Instructions and what comes of them, as many of each kind.

    Args:
        size: height and width of the pictures, up to 128.
        split: "train", "heldout", or None for both.
        count: examples, at most; fewer if the rarest kind has not enough.
        seed: of the choice.
        kinds: "skin_tone" and "gender" (siblings of the world), "recolour" (one colour for each
            picture); and the far edits "mirror", "turn" (upside down) and "invert", whose targets
            share hardly a pixel with what is given. Methods that start from the given picture
            can't be expected to learn those.

    Raises:
        InputError: there is no such kind, split or size, or `count` is below 1.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(
            f"emoji can't be edited by {', '.join(map(repr, unknown)) or 'no kind at all'}; "
            f"the kinds are {', '.join(KINDS)}."
        )
    _check(split, count)
    world, generator = load(size=size), _generator(seed)
    made = [_of_kind(world, kind, split, count // len(kinds), generator) for kind in kinds]
    share = min(map(len, made))
    return _collected("edit", world, [edit for some in made for edit in some[:share]])


def painting(
    size: int = 64, split: str | None = None, count: int = 4096, seed: int = 0
) -> Examples:
    """Captions and their pictures, for text-to-image; arguments as in `edits`."""
    world, rows = _rows(size, split, count, seed)
    return Examples("text-to-image", world.images[rows], [], _range(rows), _captions(world, rows))


def upscaling(
    size: int = 64, split: str | None = None, count: int = 4096, seed: int = 0
) -> Examples:
    """Pictures of a quarter of the size, degraded and enlarged again, and what they were.

    Arguments as in `edits`. They are degraded by `pared.worlds.degradations.MILD` and enlarged
    bicubically; the text is the caption.
    """
    import torch

    from pared.worlds.degradations import MILD, degrade, enlarge

    world, rows = _rows(size, split, count, seed)
    after = world.images[rows]
    small = degrade(after, _generator(seed + 1), scale=UPSCALING, settings=MILD)
    return Examples(
        "upscale",
        torch.cat([after, enlarge(small, (size, size))]),
        _range(rows, start=len(rows)),
        _range(rows),
        _captions(world, rows),
        [(caption, caption) for caption in _captions(world, rows)],
    )


def removal(size: int = 64, split: str | None = None, count: int = 4096, seed: int = 0) -> Examples:
    """Pictures with a smaller one of something else put on them, and without; for inpainting.

    Arguments as in `edits`. What is pasted covers a part of the picture and usually some of the
    white around it. With "heldout" the picture is a held-out row, what is pasted may be any.
    """
    import torch

    world, rows = _rows(size, split, count, seed)
    generator = _generator(seed + 1)
    allowed = range(len(world)) if split == "heldout" else _of_split(world, split)
    order = _evenly([world.bases[row] for row in allowed], generator)
    others = itertools.cycle(allowed[n] for n in order)
    # The same concept twice would leave open which of the two is to go.
    pasted = [next(o for o in others if world.bases[o] != world.bases[row]) for row in rows]

    used = sorted({*rows, *pasted})
    opacity = dict(zip(used, pixels.cut_out(world.images[used]), strict=True))
    before = [
        _with_another(world.images[row], opacity[row], world.images[top], opacity[top], generator)
        for row, top in zip(rows, pasted, strict=True)
    ]
    names = list(zip(_captions(world, rows), _captions(world, pasted), strict=True))
    return Examples(
        "inpaint",
        torch.cat([world.images[rows], torch.stack(before)]),
        _range(rows, start=len(rows)),
        _range(rows),
        [f"remove the {another}" for _, another in names],
        [(f"{one} and {another}", one) for one, another in names],
    )


# What makes the examples of each task.
MAKERS = {
    "text-to-image": painting,
    "edit": edits,
    "upscale": upscaling,
    "inpaint": removal,
}


# Edits --------------------------------------------------------------------------------------------


def _of_kind(
    world: Emoji, kind: str, split: str | None, count: int, generator: torch.Generator
) -> list[_Edit]:
    """At most `count` edits of one kind, spread evenly over the concepts of the world."""
    if kind in ("skin_tone", "gender"):
        found = pairs(world, kind, split)
        order = _evenly([world.bases[pair.before] for pair in found], generator)[:count]
        return [
            _Edit(
                found[n].before,
                found[n].after,
                found[n].instruction,
                (world.captions[found[n].before], world.captions[found[n].after]),
            )
            for n in order
        ]
    rows = _of_split(world, split)
    order = _evenly([world.bases[row] for row in rows], generator)
    # Most edits show in most pictures, so that not all have to be computed.
    rows = [rows[n] for n in order[: 4 * count + 32]]
    names = tuple(pixels.COLOURS) if kind == "recolour" else (kind,)
    made: dict[int, _Edit] = {}
    for number, name in enumerate(names):
        chosen = rows[number :: len(names)]
        edited = _edited(world.images[chosen], name)
        for row, before, after in zip(chosen, world.images[chosen], edited, strict=True):
            if (after.float() - before.float()).abs().mean() >= VISIBLE:
                caption = world.captions[row]
                text, then = _words(name, caption)
                made[row] = _Edit(row, after, text, (caption, then))
    return [made[row] for row in rows if row in made][:count]


def _edited(images: Tensor, name: str) -> Tensor:
    return pixels.FAR[name][2](images) if name in pixels.FAR else pixels.recolour(images, name)


def _words(name: str, caption: str) -> tuple[str, str]:
    """The instruction of a computed edit, and the caption after it."""
    if name in pixels.FAR:
        instruction, prefix, _ = pixels.FAR[name]
        return instruction, f"{prefix} {caption}"
    return f"make it {name}", pixels.coloured_caption(caption, name)


def _collected(task: str, world: Emoji, made: list[_Edit]) -> Examples:
    """The examples of some edits, with every picture of the world in them once."""
    import torch

    computed = [edit.after for edit in made if not isinstance(edit.after, int)]
    rows = sorted(
        {row for edit in made for row in (edit.before, edit.after) if isinstance(row, int)}
    )
    place = {row: n for n, row in enumerate(rows)}
    places = iter(range(len(rows), len(rows) + len(computed)))
    return Examples(
        task,
        torch.cat([world.images[rows], *(picture[None] for picture in computed)]),
        [place[edit.before] for edit in made],
        [place[e.after] if isinstance(e.after, int) else next(places) for e in made],
        [edit.text for edit in made],
        [edit.captions for edit in made],
    )


# Pasting ------------------------------------------------------------------------------------------


def _with_another(
    below: Tensor, below_opacity: Tensor, above: Tensor, opacity: Tensor, generator: torch.Generator
) -> Tensor:
    """`below` with `above` pasted smaller, where it covers the most suitable share of it."""
    import torch
    import torch.nn.functional as F

    size = below.shape[-1]
    low, high = PASTED
    side = round(size * (low + (high - low) * torch.rand((), generator=generator).item()))
    picture = F.interpolate((above / 255 * opacity)[None], (side, side), mode="area")[0]
    opacity = F.interpolate(opacity[None], (side, side), mode="area")[0]
    places = torch.randint(size - side + 1, (PLACES, 2), generator=generator).tolist()

    def miss(place: list[int]) -> float:
        top, left = place
        under = below_opacity[:, top : top + side, left : left + side]
        share = float((under * opacity).sum() / opacity.sum())
        return max(COVERED[0] - share, share - COVERED[1], 0.0)

    top, left = min(places, key=miss)
    return pixels.paste(below, picture, opacity, top, left)


# Choosing -----------------------------------------------------------------------------------------


def _rows(size: int, split: str | None, count: int, seed: int) -> tuple[Emoji, list[int]]:
    """The whole world, and at most `count` rows of a split, spread evenly over its concepts."""
    _check(split, count)
    world = load(size=size)
    rows = _of_split(world, split)
    order = _evenly([world.bases[row] for row in rows], _generator(seed))[:count]
    return world, [rows[n] for n in order]


def _check(split: str | None, count: int) -> None:
    if split is not None and split not in SPLITS:
        raise InputError(
            f"there is no split {split!r}; examples are of split {' or '.join(SPLITS)}, "
            "or None for both."
        )
    if count < 1:
        raise InputError(f"{count} examples can't be made; ask for at least 1.")


def _of_split(world: Emoji, split: str | None) -> list[int]:
    return [n for n, of in enumerate(world.splits) if split in (None, of)]


def _evenly(groups: list[str], generator: torch.Generator) -> list[int]:
    """A random order in which every group has had a turn before any has another."""
    import torch

    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    turns: Counter[str] = Counter()
    keyed = []
    for n in shuffled:
        turns[groups[n]] += 1
        keyed.append((turns[groups[n]], n))
    return [n for _, n in sorted(keyed, key=lambda pair: pair[0])]


def _captions(world: Emoji, rows: list[int]) -> list[str]:
    return [world.captions[row] for row in rows]


def _range(rows: list[int], start: int = 0) -> list[int]:
    return list(range(start, start + len(rows)))


def _generator(seed: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed)
