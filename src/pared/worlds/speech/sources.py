"""Where utterances come from: kinds of the speech world, or the user's own corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pared.errors import InputError
from pared.worlds import speech
from pared.worlds.readers.speech import Corpus, read_speech
from pared.worlds.speech.world import joined

if TYPE_CHECKING:
    from pared.worlds.speech import Speech

# `speech:digits+commands` is two kinds of the speech world; any other source is a corpus.
WORLD = "speech:"


def utterances(
    source: str, split: str | None, counts: Mapping[str, int], on_bad: str = "refuse"
) -> Speech | Corpus:
    """The utterances of a source.

    Args:
        source: `speech:` and kinds of the speech world, with + between them, or a corpus as
            `pared.worlds.readers.speech.read_speech` takes it.
        split: of the world or the corpus; None, or "all", takes what a corpus has by default.
        counts: utterances of kinds of the world that are to have another number than usually.
        on_bad: what to do with bad recordings of a corpus, "refuse" or "skip".

    Raises:
        InputError: there is no such source, or it can't be used.
    """
    kinds = kinds_of(source)
    if kinds:
        return joined([speech.load(kind, split or "train", counts.get(kind)) for kind in kinds])
    return read_speech(source, None if split == "all" else split, on_bad)


def check_counts(source: str, counts: Mapping[str, int]) -> None:
    """Refuse numbers of utterances for kinds that a source doesn't name.

    Raises:
        InputError: there is one.
    """
    if others := [kind for kind in counts if kind not in kinds_of(source)]:
        raise InputError(
            f"data.utterances counts {others[0]!r}, which data.source={source!r} doesn't name; "
            "give kinds of the source."
        )


def kinds_of(source: str) -> list[str]:
    """The kinds of the speech world that a source names; none for a corpus.

    Raises:
        InputError: it has no such kind.
    """
    if not source.startswith(WORLD):
        return []
    kinds = source.removeprefix(WORLD).split("+")
    for kind in kinds:
        if kind not in speech.KINDS:
            raise InputError(
                f"{source!r} names no kind of the speech world; write {WORLD}KIND with "
                f"{', '.join(speech.KINDS)}, or several with + between them."
            )
    return kinds
