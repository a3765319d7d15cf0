"""Transcripts as numbers for CTC: one per character, and 0 for its blank."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from pared.errors import InputError

BLANK = 0

_APOSTROPHES = re.compile("[\u2018\u2019\u02bc`\u00b4]")
_MARK = '[.,;:!?"()\\[\\]{}\u00ab\u00bb\u201a-\u201f\u2039\u203a\u2026\u00a1\u00bf]'
_WITHIN_NUMBERS = re.compile(rf"(?<=\d){_MARK}(?=\d)")
_BETWEEN_WORDS = re.compile(f"{_MARK}|''+|[-_/\u2010-\u2015]")
# Quotation marks, and what a word begins or ends with; those of "don't" have a letter on each side.
_OUTER = re.compile(r"(?:^|(?<=[\s\d]))'|'(?=[\s\d]|$)")


def normalised(text: str) -> str:
    """A transcript in lower case, without the marks that nobody speaks, with single spaces.

    Marks part words, so "Yes,sir" is two; within numbers they vanish, so "1,000" stays one word.
    Apostrophes stay between letters only.
    """
    text = _APOSTROPHES.sub("'", unicodedata.normalize("NFC", text).lower())
    text = _BETWEEN_WORDS.sub(" ", _WITHIN_NUMBERS.sub("", text))
    return " ".join(_OUTER.sub("", text).split())


@dataclass(frozen=True)
class Characters:
    """An alphabet.

    Attributes:
        letters: all that occurs in transcripts; letter i has the number i + 1.
    """

    letters: str = " 'abcdefghijklmnopqrstuvwxyz"

    @classmethod
    def of(cls, transcripts: Iterable[str]) -> "Characters":
        """The characters of a corpus, for languages that need others than the default."""
        return cls("".join(sorted({letter for text in transcripts for letter in normalised(text)})))

    def __len__(self) -> int:
        """How many classes a recogniser has, the blank included."""
        return len(self.letters) + 1

    def encode(self, text: str) -> list[int]:
        """Numbers of a transcript's characters, after `normalised`.

        Raises:
            InputError: it has a character that the alphabet doesn't have, or none at all.
        """
        text = normalised(text)
        for letter in text:
            if letter not in self.letters:
                raise InputError(
                    f"the transcript {text!r} has the character {letter!r}, which the alphabet "
                    f"{self.letters!r} doesn't have; write it as it is spoken, or make the "
                    "alphabet with Characters.of(transcripts)."
                )
        if not text:
            raise InputError("a transcript is empty; each utterance needs its words.")
        return [self.letters.index(letter) + 1 for letter in text]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of numbers; blanks are left out, repeated characters stay."""
        return "".join(self.letters[number - 1] for number in numbers if number != BLANK)
