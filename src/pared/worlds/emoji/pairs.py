"""Before/after pairs for instruction editing: siblings that differ in one attribute."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import permutations

from pared.errors import InputError
from pared.worlds.emoji.world import SPLITS, Emoji

# How an instruction names who is there before, and who is there after.
PEOPLE = {
    "person": ("the person", "a person"),
    "man": ("the man", "a man"),
    "woman": ("the woman", "a woman"),
    "child": ("the child", "a child"),
    "boy": ("the boy", "a boy"),
    "girl": ("the girl", "a girl"),
    "people": ("the people", "people"),
    "men": ("the men", "men"),
    "women": ("the women", "women"),
    "woman and man": ("the woman and the man", "a woman and a man"),
    "person, person": ("the two people", "two people"),
    "man, man": ("the two men", "two men"),
    "woman, woman": ("the two women", "two women"),
    "woman, man": ("the woman and the man", "a woman and a man"),
}


@dataclass(frozen=True)
class Pair:
    """One edit: the rows before and after it, and what to ask for."""

    before: int
    after: int
    instruction: str


def pairs(world: Emoji, change: str = "skin_tone", split: str | None = None) -> list[Pair]:
    """All ordered pairs of rows with the same base that differ in `change` and in nothing else.

    Args:
        world: the rows; `before` and `after` are indices into it.
        change: "skin_tone" or "gender".
        split: "train" for pairs that touch no held-out row, "heldout" for pairs that touch one on
            either side, None for both.

    Raises:
        InputError: `change` or `split` is none of these.
    """
    if change not in ("skin_tone", "gender"):
        raise InputError(
            f"emoji pairs can't change {change!r}; they change 'skin_tone' or 'gender'."
        )
    if split is not None and split not in SPLITS:
        raise InputError(
            f"there is no split {split!r}; pairs are of split {' or '.join(SPLITS)}, "
            "or None for both."
        )
    families = defaultdict(list)
    for row, (base, tone, gender) in enumerate(
        zip(world.bases, world.skin_tones, world.genders, strict=True)
    ):
        families[base, gender if change == "skin_tone" else tone].append(row)

    found = []
    for family in families.values():
        for before, after in permutations(family, 2):
            heldout = "heldout" in (world.splits[before], world.splits[after])
            if split is None or heldout == (split == "heldout"):
                found.append(Pair(before, after, _instruction(world, change, before, after)))
    return found


def _instruction(world: Emoji, change: str, before: int, after: int) -> str:
    if change == "gender":
        who, whom = PEOPLE[world.genders[before]][0], PEOPLE[world.genders[after]][1]
        return f"turn {who} into {whom}"
    tone = world.skin_tones[after]
    if ", " in tone:
        return f"make the skin tones {tone.replace(', ', ' and ')}"
    return f"make the skin tone {tone or 'yellow'}"
