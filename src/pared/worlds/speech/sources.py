"""Where utterances come from: kinds of the speech world, or the user's own corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pared.errors import InputError
from pared.worlds import speech
from pared.worlds.readers.speech import Corpus, read_speech
from pared.worlds.speech.voices import DEFAULT, check_known
from pared.worlds.speech.world import joined

if TYPE_CHECKING:
    from pared.worlds.speech import Speech

# `speech:digits+commands` is two kinds of the speech world, `speech:digits:espeak-ng+flite` one by
# the voices of two synthesizers; any other source is a corpus.
WORLD = "speech:"


def utterances(
    source: str, split: str | None, counts: Mapping[str, int], on_bad: str = "refuse"
) -> Speech | Corpus:
    """The utterances of a source.

    Args:
        source: `speech:` and kinds of the speech world, with + between them, and behind another
            colon the synthesizers of their voices, if not espeak-ng alone; or a corpus as
            `pared.worlds.readers.speech.read_speech` takes it.
        split: of the world or the corpus; None, or "all", takes what a corpus has by default.
        counts: utterances of kinds of the world that are to have another number than usually.
        on_bad: what to do with bad recordings of a corpus, "refuse" or "skip".

    Raises:
        InputError: there is no such source, or it can't be used.
    """
    if not source.startswith(WORLD):
        return read_speech(source, None if split == "all" else split, on_bad)
    kinds, synthesizers = _spoken(source)
    return joined(
        [
            speech.load(kind, split or "train", counts.get(kind), synthesizers=synthesizers)
            for kind in kinds
        ]
    )


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
        InputError: it has no such kind, or there is no such synthesizer.
    """
    return _spoken(source)[0] if source.startswith(WORLD) else []


def _spoken(source: str) -> tuple[list[str], tuple[str, ...]]:
    """Kinds and synthesizers that a source of the speech world names."""
    named, colon, voices = source.removeprefix(WORLD).partition(":")
    kinds = named.split("+")
    for kind in kinds:
        if kind not in speech.KINDS:
            raise InputError(
                f"{source!r} names no kind of the speech world; write {WORLD}KIND with "
                f"{', '.join(speech.KINDS)}, or several with + between them."
            )
    synthesizers = tuple(voices.split("+")) if colon else (DEFAULT,)
    check_known(synthesizers)
    return kinds, synthesizers
