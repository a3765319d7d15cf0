"""An alphabet as the tokenizer that transformers has for CTC: plain JSON that every tool reads."""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import Wav2Vec2CTCTokenizer

from pared.errors import InputError
from pared.worlds.speech.characters import Characters

BLANK, SPACE = "<pad>", "|"


def tokenizer_of(characters: Characters) -> Wav2Vec2CTCTokenizer:
    """The tokenizer of an alphabet: each letter keeps its number, and 0 is the blank.

    Raises:
        InputError: a letter is the one that stands for the space.
    """
    if SPACE in characters.letters:
        raise InputError(
            f"the alphabet {characters.letters!r} has {SPACE!r}, which stands for the space; take "
            "it out of the transcripts."
        )
    letters = [SPACE if letter == " " else letter for letter in characters.letters]
    numbers = {letter: number for number, letter in enumerate([BLANK, *letters])}
    # The class reads its vocabulary from a file.
    with tempfile.TemporaryDirectory(prefix="pared-") as folder:
        path = Path(folder, "vocab.json")
        path.write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(
            str(path),
            bos_token=None,
            eos_token=None,
            unk_token=None,
            pad_token=BLANK,
            word_delimiter_token=SPACE,
        )


def characters_in(tokenizer: Any, classes: int) -> Characters:
    """The alphabet of a tokenizer as `tokenizer_of` makes it; its inverse.

    Args:
        tokenizer: with the blank, then single letters.
        classes: that its model scores.

    Raises:
        InputError: it's another kind of tokenizer.
    """
    blank, *letters = (tokenizer.convert_ids_to_tokens(number) for number in range(classes))
    if blank != tokenizer.pad_token or any(len(letter) != 1 for letter in letters):
        raise InputError(
            f"the labels {[blank, *letters][:6]} ... can't be learnt from transcripts here; give a "
            "model whose first class is the blank and whose others are single letters."
        )
    return Characters("".join(" " if letter == SPACE else letter for letter in letters))
