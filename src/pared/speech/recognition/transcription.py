"""Recordings of any length: windows that overlap, scores of their middles one after another.

Each window has context on both sides, whose frames are left out, so that every frame that counts
was scored with what came before it and after it. Windows lie on the model's own grid of frames:
their middles put together are the frames of the whole. Held are one window of sound and the labels
that aren't settled yet, however long the recording is.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pared.speech.recognition.decoding import Beam, Decoder, Greedy, Word, Words
from pared.speech.recognition.model import Recogniser

# Seconds of sound that a window brings, and of context on either side.
STEP, CONTEXT = 16.0, 4.0


def transcribe(recogniser: Recogniser, pieces: Iterable[Tensor], beam: int = 1) -> Iterator[Word]:
    """The words of a recording, as soon as they are known.

    Args:
        recogniser: see `pared.speech.recognition.load`.
        pieces: the recording, float (samples,) each, at the recogniser's rate.
        beam: prefixes that decoding keeps; 1 takes the best label of each frame.
    """
    blank = recogniser.blank
    decoder: Decoder = Greedy(blank) if beam == 1 else Beam(blank, beam)
    words = Words(recogniser.tokenizer, recogniser.hop / recogniser.rate)
    for scores in windowed(recogniser, pieces):
        yield from words(decoder(scores))
    yield from words(decoder.flush())
    yield from words.flush()


def windowed(
    recogniser: Recogniser,
    pieces: Iterable[Tensor],
    step: float = STEP,
    context: float = CONTEXT,
) -> Iterator[Tensor]:
    """The scores of a recording window by window, (frames, classes), each frame once.

    Args:
        recogniser: what scores.
        pieces: the recording, float (samples,) each, at the recogniser's rate.
        step: seconds that a window brings.
        context: seconds on either side of them, at most `step`.
    """
    hop = recogniser.hop
    new, beside = (max(1, round(s * recogniser.rate / hop)) for s in (step, context))  # in frames
    held, before = torch.empty(0), 0
    for piece in pieces:
        held = torch.cat([held, piece])
        # More than a window: what is after the context tells that this is not the end.
        while len(held) > (window := (before + new + beside) * hop):
            yield recogniser.scores(held[:window])[before : before + new]
            held = held[(before + new - beside) * hop :]
            before = beside
    if len(held):
        yield recogniser.scores(held)[before:]
