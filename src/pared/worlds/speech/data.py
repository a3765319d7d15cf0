"""Training data of speech as the loop wants it: whole batches by index."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pared.errors import InputError
from pared.worlds.draws import Draw
from pared.worlds.speech.audio import RATE
from pared.worlds.speech.characters import BLANK, Characters
from pared.worlds.speech.mixtures import (
    BABBLERS,
    Mixer,
    Mixing,
    coloured_noise,
    level,
    looped,
    rms,
    scaled,
    unclipped,
)
from pared.worlds.speech.talkers import Talkers, Utterances


@dataclass
class EnhancementData:
    """Mixtures for personalised enhancement, mixed as they are drawn.

    A batch holds `noisy`, `target` and `interference`, (batch, samples); `enrolment` (batch,
    longest), padded with zeros, and `enrolment_samples` (batch,), its length without; `speaker`
    (batch,) and `interferers` (batch, most), -1 where there is none; `sir` and `snr` (batch,) in
    dB, infinite without other talkers or noise; `present` (batch,), whether the target speaks.

    Attributes:
        speech: whose speakers are known, and have two utterances at least.
        mixing: chances and ranges.
        seconds: length of the mixtures.
        noises: recorded noises to take instead of coloured noise and babble.
    """

    speech: Utterances
    mixing: Mixing = field(default_factory=Mixing)
    seconds: float = 4.0
    noises: Utterances | None = None

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise InputError(f"mixtures can't be {self.seconds} s long; give more than 0.")
        samples = round(self.seconds * RATE)
        self.mixer = Mixer(self.speech, self.mixing, samples, self.noises)

    def __len__(self) -> int:
        return len(self.speech)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = [self.mixer.mixture(index, generator) for index in indices.tolist()]
        enrolments = [one.enrolment for one in drawn]
        most = self.mixing.interferers[1]
        padded = [[*one.interferers, *[-1] * (most - len(one.interferers))] for one in drawn]
        return {
            "noisy": torch.stack([one.mixture for one in drawn]),
            "target": torch.stack([one.target for one in drawn]),
            "interference": torch.stack([one.interference for one in drawn]),
            "enrolment": pad_sequence(enrolments, batch_first=True),
            "enrolment_samples": torch.tensor([len(one) for one in enrolments]),
            "speaker": torch.tensor([one.speaker for one in drawn]),
            "interferers": torch.tensor(padded, dtype=torch.int64).view(len(drawn), most),
            "sir": torch.tensor([one.sir for one in drawn]),
            "snr": torch.tensor([one.snr for one in drawn]),
            "present": torch.tensor([one.present for one in drawn]),
        }

    def identity(self) -> str:
        noises = self.noises.identity() if self.noises is not None else ""
        return _digest(self.speech.identity(), noises, self.mixing, self.seconds)


@dataclass
class TranscriptData:
    """Utterances and what is said in them, for recognisers trained with CTC.

    A batch holds `waveform` (batch, longest), padded with zeros, and `lengths` (batch,) in samples;
    `labels` (batch, most), the characters' numbers, padded with the blank 0, and `label_lengths`
    (batch,).

    Synthesizers end every utterance alike and speak equally loud. Random loudness, and random
    silence around the utterance, keep a model from learning that.

    Attributes:
        speech: every utterance has a transcript.
        characters: the alphabet.
        silence: greatest silence before and after, in seconds each.
        level: root mean square, in dB of full scale.
        snr: of the noise, in dB: half coloured noise, half babble where the speakers are known;
            None for none.
        noises: recorded noises to take instead.
    """

    speech: Utterances
    characters: Characters = field(default_factory=Characters)
    silence: float = 0.3
    level: tuple[float, float] = (-35.0, -15.0)
    snr: tuple[float, float] | None = None
    noises: Utterances | None = None

    def __post_init__(self) -> None:
        self.labels = []
        for index, transcript in enumerate(self.speech.transcripts):
            if transcript is None:
                raise InputError(f"utterance {index} has no transcript; recognisers learn from it.")
            self.labels.append(torch.tensor(self.characters.encode(transcript)))
        self.talkers = None if None in self.speech.speakers else Talkers(self.speech)

    def __len__(self) -> int:
        return len(self.speech)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        waveforms = [self._heard(index, generator) for index in indices.tolist()]
        labels = [self.labels[index] for index in indices.tolist()]
        return {
            "waveform": pad_sequence(waveforms, batch_first=True),
            "lengths": torch.tensor([len(one) for one in waveforms]),
            "labels": pad_sequence(labels, batch_first=True, padding_value=BLANK),
            "label_lengths": torch.tensor([len(one) for one in labels]),
        }

    def identity(self) -> str:
        noises = self.noises.identity() if self.noises is not None else ""
        settings = self.characters, self.silence, self.level, self.snr
        return _digest(self.speech.identity(), noises, settings)

    def _heard(self, index: int, generator: torch.Generator) -> Tensor:
        """One utterance with silence around it, as loud as drawn, in noise."""
        draw = Draw(generator)
        clean = self.speech.waveform(index)
        clean = clean * level(draw, self.level) / rms(clean)
        before, after = (round(draw.uniform(0, self.silence) * RATE) for _ in range(2))
        padded = torch.nn.functional.pad(clean, (before, after))
        if self.snr is None:
            return unclipped(padded)
        noise = scaled(self._noise(len(padded), draw), clean, draw.uniform(*self.snr))
        return unclipped(padded + noise)

    def _noise(self, samples: int, draw: Draw) -> Tensor:
        if self.noises is not None:
            return looped(self.noises.waveform(draw.below(len(self.noises))), samples, draw)
        if self.talkers is not None and draw.chance(0.5):
            return self.talkers.babble(BABBLERS, samples, draw.generator)
        return coloured_noise(samples, draw.uniform(0, 2), draw.generator)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
