"""What recognisers learn from: utterances with transcripts, made into what a model reads."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pared.objectives.ctc import frames_needed
from pared.speech.recognition.model import Recogniser
from pared.worlds.readers.items import report
from pared.worlds.readers.speech import Corpus
from pared.worlds.speech.audio import RATE, resampled
from pared.worlds.speech.characters import Characters
from pared.worlds.speech.data import TranscriptData
from pared.worlds.speech.sources import kinds_of
from pared.worlds.speech.world import Speech


def characters_of(source: str, said: Speech | Corpus) -> Characters:
    """The alphabet of a source: English letters for the speech world, a corpus's own otherwise."""
    if kinds_of(source):
        return Characters()
    return Characters.of(text for text in said.transcripts if text is not None)


@dataclass
class RecognitionData:
    """Batches as `pared.objectives.ctc.CTC` takes them, drawn with others of similar length.

    The features are made by the extractor that is saved with the model, so that what it learns from
    is what it will be given.

    Attributes:
        data: utterances with noise and silence around them, and their transcripts as numbers.
        recogniser: what makes the inputs.
        lengths: of the utterances, in samples at 16 kHz.
        indices: of the utterances that are used, where not all are.
    """

    data: TranscriptData
    recogniser: Recogniser
    lengths: list[int]
    indices: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.indices = list(range(len(self.data)))

    def __len__(self) -> int:
        return len(self.indices)

    def leave_out_unsayable(self, source: str, on_bad: str) -> None:
        """Leave out what has too few frames for its transcript, which CTC can't learn from.

        Args:
            source: what the user asked to read, for messages.
            on_bad: "refuse" or "skip" such utterances.

        Raises:
            InputError: there are some, and they are to be refused.
        """
        hop = self.recogniser.hop * RATE / self.recogniser.rate
        faults, usable = [], []
        for index, length in enumerate(self.lengths):
            needed, frames = frames_needed(self.data.labels[index]), int(length / hop)
            if needed > frames:
                text = self.data.speech.transcripts[index]
                faults.append(f"{text!r} (needs {needed} frames and has {frames})")
            else:
                usable.append(index)
        if faults:
            report(source, faults, len(self.data), on_bad, "time enough for its words")
        self.indices = usable
        self.lengths = [self.lengths[index] for index in usable]

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `CTC`."""
        chosen = torch.tensor(self.indices)[indices]
        drawn = self.data.batch(chosen, generator)
        sounds = [
            resampled(waveform[:length], RATE, self.recogniser.rate)
            for waveform, length in zip(drawn["waveform"], drawn["lengths"], strict=True)
        ]
        labels = {name: drawn[name] for name in ("labels", "label_lengths")}
        return self.recogniser.inputs(sounds) | labels

    def identity(self) -> str:
        told = self.data.identity(), self.indices, self.recogniser.extractor.to_json_string()
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
