"""What is said: strings of digits, commands, and sentences over a few thousand words.

The sentences mean little on purpose, like the unpredictable sentences of listening tests: no word
can be guessed from the others, so an error rate tells what was heard.

Held out are whole combinations. A tenth of all pairs of words that could stand in neighbouring
slots ("proud" and "otter", or "seven" after "two") occurs in no training text, and every held-out
text has such a pair. What a text belongs to follows from its words alone, whatever the seed.
"""

import itertools
import random
import re
import zlib
from functools import cache

from pared.errors import InputError
from pared.worlds.speech import words

KINDS = ("digits", "commands", "sentences")
SPLITS = ("train", "validation", "heldout")

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

COMMANDS = (
    "turn {switch} the {room} {device}",
    "set the {room} {device} to {percent} percent",
    "set {alarm} for {number} {unit}",
    "wake me at {number} in the {daytime}",
    "play {music} in the {room}",
    "play {music} for {number} {unit}",
    "call {contact} {day}",
    "send {message} to {contact}",
    "{open} the {room} {opening}",
    "{open} the {opening} in {number} {unit}",
    "what is the weather in {city} {day}",
    "how far is {city} from {city}",
    "add {food} and {food} to the list",
    "order {number} boxes of {food}",
    "remind {contact} to {chore} {day}",
    "make the {music} {loudness}",
)

SENTENCES = (
    "the {adjective} {person} {past} the {thing} {where} the {place}",
    "{name} {past} a {adjective} {thing} {time}",
    "{time} the {animal} {went} {whither} the {place}",
    "{adverb} {name} {past} {count} {things}",
    "did the {persons} {base} the {thing} {where} the {place}",
    "the {animals} will {adverb} {base} your {adjective} {thing}",
    "my {thing} is {adjective} and so is the {animal}",
    "{count} {adjective} {persons} {went} {whither} the {place}",
    "please {base} this {material} {thing} {time}",
    "who {past} the {animal} and the {thing}",
    "{name} and {name} {adverb} {past} the {adjective} {place}",
    "the {thing} that {name} {past} was {adjective}",
    "no {person} should {base} a {thing} without {participle} a {thing}",
    "every {person} {present} the {places}",
    "why does the {adjective} {animal} {base} the {things}",
    "if the {person} {present} the {thing} then {name} will {go}",
    "the {persons} {past} the {thing} because the {animal} was {adjective}",
    "they were {participle} {count} {things} {where} the {place}",
    "{participle} a {adjective} {animal} is not {adjective}",
    "can you {base} the {material} {things} {time}",
    "there are {things} {where} the {adjective} {places}",
    "the {person} who {present} {animals} also {present} {things}",
    "give the {thing} to the {adjective} {person} before {participle} the {animal}",
    "{things} and {animals} were {adjective} {time}",
)

TEMPLATE = ""  # the name of the pack of templates

# "an" where the next word begins with the sound of a vowel.
_AN = re.compile(r"\ba (?=honest|[aeio]|u(?!ni|se|su))")

_COMMAND_SLOTS = {
    "switch": "on off down",
    "room": "kitchen bedroom bathroom garage garden hall office cellar attic library",
    "device": "light lamp heater fan radio television speaker camera printer oven",
    "percent": "ten twenty thirty forty fifty sixty seventy eighty ninety",
    "number": "two three five six seven nine ten eleven twelve fifteen twenty thirty",
    "unit": "seconds minutes hours days weeks",
    "alarm": "a_timer an_alarm a_reminder",
    "daytime": "morning afternoon evening",
    "music": "jazz opera the_news folk_music my_favourites quiet_songs a_story the_album",
    "contact": "anna peter susan george helen martin julia oscar emma victor my_mother the_doctor",
    "day": "today tomorrow tonight on_monday on_tuesday on_thursday on_friday on_saturday",
    "message": "a_message an_email a_picture my_address the_report",
    "open": "open close lock unlock",
    "opening": "door window gate curtain shutter blinds",
    "city": "london paris berlin madrid vienna oslo dublin lisbon athens warsaw prague cairo",
    "food": "bread milk coffee sugar apples butter cheese rice onions honey noodles pepper",
    "chore": "water_the_plants feed_the_cat pay_the_bills wash_the_car buy_tickets call_home",
    "loudness": "louder softer slower faster",
}


def texts(kind: str, split: str, count: int, seed: int = 0) -> list[str]:
    """Different texts, lower case, letters and single spaces only; more begin as fewer do.

    Args:
        kind: one of `KINDS`.
        split: one of `SPLITS`.
        count: how many.
        seed: of the choice among the texts of the split.

    Raises:
        InputError: there is no such kind or split, or it has fewer texts.
    """
    for given, known, what in ((kind, KINDS, "kind"), (split, SPLITS, "split")):
        if given not in known:
            raise InputError(
                f"the speech world has no {what} {given!r}; it has {', '.join(known)}."
            )
    found: dict[str, None] = {}
    fruitless = 0
    cards = _Cards(random.Random(f"{kind}-{split}-{seed}"))
    while len(found) < count:
        text, slots = _composed(kind, cards)
        fits = split_of(text, slots) == split and text not in found
        # Training is to use every word. Held-out texts need what happens to be held out together.
        cards.finish(used=fits or split != "train")
        if fits:
            found[text] = None
            fruitless = 0
        elif (fruitless := fruitless + 1) > 10_000:
            raise InputError(
                f"the speech world has no {count} different {kind} of split {split!r}; ask for "
                f"{len(found)} at most."
            )
    return list(found)


def split_of(text: str, slots: list[str]) -> str:
    """The split that a text belongs to, given what fills its slots in their order."""
    if not any(held_out(pair) for pair in itertools.pairwise(slots)):
        return "train"
    return SPLITS[1 + zlib.crc32(text.encode()) % 2]


def held_out(pair: tuple[str, str]) -> bool:
    """Whether two neighbouring fillings occur in no training text; one pair of ten."""
    return zlib.crc32(" ".join(pair).encode()) % 10 == 0


def vocabulary(kind: str) -> set[str]:
    """Every word that can occur."""
    if kind == "digits":
        return set(DIGITS)
    templates, slots = _grammar(kind)
    fixed = re.sub(r"\{\w+\}", "", " ".join(templates)).split()
    filled = " ".join(word for filling in slots.values() for word in filling).split()
    return {*fixed, *filled} | ({"an"} if kind == "sentences" else set())


def intent_of(text: str) -> str | None:
    """What a command wants: the one template of `COMMANDS` that a text follows; None if none."""
    return next((intent for intent, said in _said().items() if said.fullmatch(text)), None)


def _composed(kind: str, cards: "_Cards") -> tuple[str, list[str]]:
    """A text, and what fills its slots."""
    if kind == "digits":
        digits = [cards.rng.choice(DIGITS) for _ in range(cards.rng.randint(2, 5))]
        return " ".join(digits), digits
    templates, slots = _grammar(kind)
    template = cards.deal(TEMPLATE, templates)
    filling = [cards.deal(name, slots[name]) for name in re.findall(r"\{(\w+)\}", template)]
    text = re.sub(r"\{\w+\}", "{}", template).format(*filling)
    return _AN.sub("an ", text), filling


class _Cards:
    """Deals from packs of words, so that all of a pack are used about equally often.

    Args:
        rng: shuffles.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.packs: dict[str, list[str]] = {}
        self.dealt: list[tuple[str, str]] = []

    def deal(self, name: str, pack: tuple[str, ...]) -> str:
        """The next card of the pack called `name`."""
        left = self.packs.setdefault(name, [])
        # Some always remain: with the last few alone, no text might fit.
        if len(left) <= len(pack) // 2:
            left[:0] = self.rng.sample(pack, len(pack))
        card = left.pop()
        self.dealt.append((name, card))
        return card

    def finish(self, used: bool) -> None:
        """Begin a new text; if the last one isn't used, its words go back into their packs."""
        for name, card in self.dealt:
            if not used and name != TEMPLATE:
                left = self.packs[name]
                left.insert(self.rng.randrange(len(left) + 1), card)
        self.dealt.clear()


@cache
def _grammar(kind: str) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Templates, and what may fill their slots."""
    if kind == "commands":
        return COMMANDS, {name: _split(text) for name, text in _COMMAND_SLOTS.items()}
    slots = {
        "adjective": words.ADJECTIVES,
        "adverb": words.ADVERBS,
        "name": words.NAMES,
        "where": words.WHERE,
        "whither": words.WHITHER,
        "time": words.TIMES,
        "count": words.COUNTS,
        "material": words.MATERIALS,
    }
    filled = {name: _split(text) for name, text in slots.items()}
    for one, text in (
        ("person", words.PEOPLE),
        ("animal", words.ANIMALS),
        ("thing", words.THINGS),
        ("place", words.PLACES),
    ):
        nouns = _split(text)
        filled[one] = tuple(noun.split("/")[0] for noun in nouns)
        filled[one + "s"] = tuple(plural(noun) for noun in nouns)
    verbs, motions = _split(words.VERBS), _split(words.MOTIONS)
    filled["base"] = tuple(verb.split("/")[0] for verb in verbs)
    filled["present"] = tuple(_with_s(verb.split("/")[0]) for verb in verbs)
    filled["past"] = tuple(past(verb) for verb in verbs)
    filled["participle"] = tuple(participle(verb) for verb in verbs)
    filled["go"] = tuple(verb.split("/")[0] for verb in motions)
    filled["went"] = tuple(past(verb) for verb in motions)
    return SENTENCES, filled


@cache
def _said() -> dict[str, re.Pattern[str]]:
    """What matches all texts of a command's template, by the template."""
    templates, slots = _grammar("commands")
    choices = {name: f"(?:{'|'.join(fillings)})" for name, fillings in slots.items()}
    return {template: re.compile(template.format(**choices)) for template in templates}


def plural(noun: str) -> str:
    """The plural of an entry: "lady" -> "ladies", "mouse/mice" -> "mice"."""
    one, _, many = noun.partition("/")
    return many or _with_s(one)


def past(verb: str) -> str:
    """The past of an entry: "carry" -> "carried", "take/took" -> "took"."""
    base, _, rest = verb.partition("/")
    if rest:
        return rest.split("/")[0]
    if re.search("[^aeiou]y$", base):
        return base[:-1] + "ied"
    return base + ("d" if base.endswith("e") else "ed")


def participle(verb: str) -> str:
    """The present participle: "make/made" -> "making", "drop/dropped" -> "dropping"."""
    base, *rest = verb.split("/")
    if len(rest) == 2:
        return rest[1]
    if rest and rest[0] == base + base[-1] + "ed":
        return base + base[-1] + "ing"
    return (base[:-1] if re.search("[^eoy]e$", base) else base) + "ing"


def _with_s(word: str) -> str:
    """A regular plural, or the third person of a verb."""
    if re.search("[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search("(s|x|z|ch|sh)$", word) else "s")


def _split(text: str) -> tuple[str, ...]:
    return tuple(entry.replace("_", " ") for entry in text.split())
