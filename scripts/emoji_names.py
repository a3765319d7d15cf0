"""What the Unicode name of an emoji says: caption, concept, skin tone and gender.

Used by `build_emoji.py`. The names come from Unicode's `emoji-test.txt`; sequences newer than that
file come from the `emoji` package, whose underscored names are turned back into CLDR's spelling.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from emoji import EMOJI_DATA, STATUS

PEOPLE = "People & Body"
NEUTRAL = ("person", "people")

# Families of names whose gender is not the word "man", "woman" or "person" in front.
IRREGULAR = {
    "boy": ("child", "boy"),
    "girl": ("child", "girl"),
    "child": ("child", "child"),
    "man": ("adult", "man"),
    "woman": ("adult", "woman"),
    "person": ("adult", "person"),
    "old man": ("old", "man"),
    "old woman": ("old", "woman"),
    "older person": ("old", "person"),
    "prince": ("with crown", "man"),
    "princess": ("with crown", "woman"),
    "santa claus": ("claus", "man"),
    "mrs. claus": ("claus", "woman"),
    "mx claus": ("claus", "person"),
    "merman": ("merperson", "man"),
    "mermaid": ("merperson", "woman"),
    "kiss": ("kiss", "person, person"),
    "couple with heart": ("couple with heart", "person, person"),
}
LEADING = re.compile(r"(woman and man|man|woman|person|men|women|people):? (?P<base>.+)")
TRAILING = re.compile(r"(?P<base>deaf|pregnant) (man|woman|person)")
COUPLE = re.compile(r"(?P<base>kiss|couple with heart): (\w+, \w+)")

TEST_LINE = re.compile(r"[0-9A-F ]+; fully-qualified +# (\S+) E[\d.]+ (.+)")
TONES_AT_END = re.compile(r" (((medium-)?(light|dark)|medium) skin tone)+$")
ONE_TONE = re.compile(r"(?:(?:medium-)?(?:light|dark)|medium) skin tone")


@dataclass(frozen=True)
class Name:
    """One emoji and what its Unicode name says about it."""

    emoji: str
    caption: str
    group: str
    base: str
    skin_tone: str
    gender: str


def read_names(emoji_test: Path) -> list[Name]:
    """All fully-qualified emoji, those of `emoji-test.txt` first, in Unicode's order."""
    listed = _listed(emoji_test)
    names = [_parse(emoji, *entry) for emoji, entry in (listed | _newer(listed)).items()]
    return _settle_families(names)


def _listed(emoji_test: Path) -> dict[str, tuple[str, str]]:
    """Characters to (name, group), from `emoji-test.txt`."""
    found, group = {}, ""
    for line in emoji_test.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif match := TEST_LINE.match(line):
            found[match[1]] = (match[2], group)
    return found


def _newer(listed: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Fully-qualified emoji that the `emoji` package knows and `emoji-test.txt` doesn't.

    Each takes the group of the longest known emoji it begins with: a person facing right is a
    person, a phoenix (bird + fire) an animal. A wholly new character has group "".
    """
    found = {}
    for emoji, data in EMOJI_DATA.items():
        if data["status"] != STATUS["fully_qualified"] or emoji in listed:
            continue
        name = _cldr_spelling(data["en"].strip(":").replace("_", " "))
        beginnings = [emoji[:end] for end in range(len(emoji) - 1, 0, -1)]
        known = next((start for start in beginnings if start in listed), None)
        found[emoji] = (name, listed[known][1] if known else "")
    return found


def _cldr_spelling(name: str) -> str:
    """Put back the colon and commas that the `emoji` package drops."""
    if tones := TONES_AT_END.search(name):
        return f"{name[: tones.start()]}: {', '.join(ONE_TONE.findall(tones[0]))}"
    if name.startswith("family "):
        return f"family: {name.removeprefix('family ').replace(' ', ', ')}"
    return name


def _parse(emoji: str, name: str, group: str) -> Name:
    caption = name.lower()
    head, _, detail = caption.partition(": ")
    details = detail.split(", ") if detail else []
    tones = [part.removesuffix(" skin tone") for part in details if part.endswith(" skin tone")]
    others = [part for part in details if not part.endswith(" skin tone")]
    concept = f"{head}: {', '.join(others)}" if others else head
    base, gender = _gender(concept) if group == PEOPLE else (concept, "")
    return Name(emoji, caption, group, base, ", ".join(tones), gender)


def _gender(concept: str) -> tuple[str, str]:
    """Split a name without its skin tone into (base, gender)."""
    if concept in IRREGULAR:
        return IRREGULAR[concept]
    for pattern in (LEADING, TRAILING, COUPLE):
        if match := pattern.fullmatch(concept):
            gender = next(word for word in match.groups() if word != match["base"])
            return match["base"], gender
    return concept, ""


def _settle_families(names: list[Name]) -> list[Name]:
    """Keep base and gender apart only where a concept really comes in several genders.

    "firefighter" beside "man firefighter" is the neutral member and becomes "person"; "person in
    bed", which has no gendered sibling, keeps its whole name as its base and no gender.
    """
    genders = defaultdict(set)
    for name in names:
        if name.gender:
            genders[name.base].add(name.gender)
        elif name.group == PEOPLE:
            genders[name.base].add("person")
    settled = []
    for name in names:
        family = name.group == PEOPLE and len(genders[name.base]) > 1
        if family:
            name = replace(name, gender=name.gender or "person")
        elif name.gender:
            gender = "" if name.gender in NEUTRAL else name.gender
            name = replace(name, base=_whole_concept(name), gender=gender)
        settled.append(name)
    return settled


def _whole_concept(name: Name) -> str:
    """The caption without its skin tone."""
    return re.sub(rf"(: |, ){ONE_TONE.pattern}", "", name.caption)
