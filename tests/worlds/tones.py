"""Utterances without a synthesizer: each a tone of its own, each speaker an octave of his own."""

import math
from dataclasses import dataclass

import torch

RATE = 16000


@dataclass(frozen=True)
class Tones:
    """`each` utterances of every speaker; the u-th of speaker s sounds at 110 * 2^s + 10 u Hz."""

    speakers_count: int = 4
    each: int = 3
    seconds: float = 0.8

    def __len__(self):
        return self.speakers_count * self.each

    @property
    def speakers(self):
        return [f"tone {index // self.each}" for index in range(len(self))]

    @property
    def transcripts(self):
        return [f"tone {'abcdefghijkl'[index]}" for index in range(len(self))]

    def frequency(self, index):
        return 110 * 2 ** (index // self.each) + 10 * (index % self.each)

    def waveform(self, index):
        # No two are of the same length.
        time = torch.arange(round((self.seconds + 0.01 * index) * RATE)) / RATE
        return 0.5 * torch.sin(2 * math.pi * self.frequency(index) * time)

    def identity(self):
        return repr(self)


def write_librispeech(folder, tones):
    """The tones as FLAC files with transcripts, laid out as a part of LibriSpeech is."""
    import soundfile

    for n in range(len(tones)):
        speaker, turn = divmod(n, tones.each)
        chapter = folder / str(speaker) / "1"
        chapter.mkdir(parents=True, exist_ok=True)
        name = f"{speaker}-1-{turn:04}"
        with (chapter / f"{speaker}-1.trans.txt").open("a") as file:
            file.write(f"{name} TONE\n")
        soundfile.write(chapter / f"{name}.flac", tones.waveform(n).numpy(), RATE)
