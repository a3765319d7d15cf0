"""The speech world: utterances of many voices with their transcripts, spoken on this machine.

    >>> from pared.worlds import speech
    >>> world = speech.load("sentences", split="heldout")
    >>> world.waveform(0).shape, world.transcripts[0], world.speakers[0]

espeak-ng speaks, once; what it has spoken stays in the cache. Everything follows from a seed:
texts (`grammar`), voices and rates (`voices`), and the mixtures with other talkers, babble, noise
and rooms that models are trained on (`mixtures`, `rooms`, `data`).

Held-out utterances come from voices that never occur in training, and say combinations of words
that never occur there. Users' own recordings are read by `pared.worlds.readers.speech`.
"""

from pared.worlds.speech.grammar import KINDS, SPLITS
from pared.worlds.speech.world import SIZES, Speech, load

__all__ = ["KINDS", "SIZES", "SPLITS", "Speech", "load"]
