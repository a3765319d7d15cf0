"""One talker among others, babble, noise and reflections: what personalised enhancement is given.

The recipe is the one of streaming personalised enhancement (arXiv 2211.04346) as far as it is
known; what the paper leaves open is chosen:

- Noise is white to brown (power 1 / f^a, a from 0 to 2), or for 30 % the babble of six others.
- Interfering talkers have one SIR together, and noise has its SNR, both to the target as heard,
  over the whole clip.
- In a room every talker has a place, and noise comes from everywhere. The target to be recovered
  is its direct sound with the reflections of the first 50 ms.
- "Target only" means nothing else at all: no talker and no noise. Where the target is missing, the
  others are as loud as they would have been beside it.
- The target is between -35 and -15 dB of full scale; what clips is scaled down as a whole.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pared.errors import InputError
from pared.worlds.draws import Draw
from pared.worlds.speech import rooms
from pared.worlds.speech.audio import RATE
from pared.worlds.speech.talkers import Talkers, Utterances

Range = tuple[float, float]

BABBLERS = 6
HIGHEST_PEAK = 0.99


@dataclass(frozen=True)
class Mixing:
    """Chances and ranges.

    Attributes:
        interferers: least and greatest number of other talkers.
        sir: target to the other talkers, in dB.
        snr: target to the noise, in dB; None leaves noise out.
        babble: chance that the noise is babble.
        room: chance that the talkers are in a room.
        t60: reverberation time of rooms, in seconds.
        absent: chance that the target is missing.
        alone: chance that there is nothing but the target.
        level: of the target, in dB of full scale.
        enrolment_seconds: length of the enrolment.
        enrolment_noise: chance that the enrolment is noisy too, with an SNR from `snr`.
        pitch: what every talker's frequencies are multiplied with, anew in each mixture, the same
            in the enrolment: of few voices it makes many. Babble keeps the voices as they are.
        mood: what the frequencies of every single utterance are multiplied with beside, anew for
            each, in mixture and enrolment: nobody says everything at one pitch.
    """

    interferers: tuple[int, int] = (0, 2)
    sir: Range = (-5.0, 10.0)
    snr: Range | None = (0.0, 20.0)
    babble: float = 0.3
    room: float = 0.5
    t60: Range = (0.2, 0.8)
    absent: float = 0.1
    alone: float = 0.2
    level: Range = (-35.0, -15.0)
    enrolment_seconds: Range = (3.0, 10.0)
    enrolment_noise: float = 0.3
    pitch: Range = (1.0, 1.0)
    mood: Range = (1.0, 1.0)

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (pydantic's own form)

    def __post_init__(self) -> None:
        ranges = ("interferers", "sir", "snr", "t60", "level", "enrolment_seconds", "pitch", "mood")
        for name in ranges:
            bounds = getattr(self, name)
            if bounds is not None and bounds[0] > bounds[1]:
                raise InputError(f"{name} can't be from {bounds[0]} to {bounds[1]}; swap them.")
        for name in ("babble", "room", "absent", "alone", "enrolment_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} can't be {getattr(self, name)}; it is a chance, 0 to 1.")
        if self.interferers[0] < 0 or self.t60[0] <= 0 or self.enrolment_seconds[0] <= 0:
            raise InputError(
                f"interferers={self.interferers}, t60={self.t60}, enrolment_seconds="
                f"{self.enrolment_seconds} don't work; numbers of talkers are at least 0, and "
                "times above 0."
            )
        for name in ("pitch", "mood"):
            if (factors := getattr(self, name))[0] <= 0:
                raise InputError(f"{name}={factors} doesn't work; factors are above 0.")
        if self.absent + self.alone > 1:
            raise InputError(
                f"absent={self.absent} and alone={self.alone} exclude each other and can't sum "
                "to more than 1."
            )


@dataclass(frozen=True)
class Mixture:
    """A clip and what it is made of; `mixture` is the sum of what the microphone heard.

    Attributes:
        mixture: float32 (samples,) in [-1, 1].
        target: what is to be recovered, (samples,); zero where the target is missing.
        interference: all other talkers as heard, (samples,).
        noise: (samples,).
        enrolment: another recording of the target, (enrolment samples,).
        speaker: the target's number.
        interferers: numbers of the other talkers.
        sir: in dB; infinite without other talkers.
        snr: in dB; infinite without noise.
        present: whether the target speaks.
    """

    mixture: Tensor
    target: Tensor
    interference: Tensor
    noise: Tensor
    enrolment: Tensor
    speaker: int
    interferers: tuple[int, ...]
    sir: float
    snr: float
    present: bool


class Mixer:
    """Draws mixtures over the utterances of a corpus.

    Args:
        speech: whose speakers are known, and have two utterances at least.
        mixing: chances and ranges.
        samples: length of the mixtures.
        noises: recorded noises to take instead of coloured noise and babble.

    Raises:
        InputError: there are too few speakers, or one of them can't be enrolled.
    """

    def __init__(
        self,
        speech: Utterances,
        mixing: Mixing,
        samples: int,
        noises: Utterances | None = None,
    ) -> None:
        self.talkers = Talkers(speech)
        self.mixing, self.samples, self.noises = mixing, samples, noises
        self.talkers.need_enrolment()
        babbling = mixing.snr is not None and mixing.babble > 0 and noises is None
        others = max(mixing.interferers[1], int(babbling))
        if len(self.talkers) <= others:
            raise InputError(
                f"{len(self.talkers)} speakers are too few to mix one with {others} others; give "
                "recordings of more speakers, or mix with fewer interferers and without babble."
            )

    def mixture(self, utterance: int, generator: torch.Generator) -> Mixture:
        """A clip in which the target says `utterance`, and perhaps more."""
        mixing, draw = self.mixing, Draw(generator)
        speaker = self.talkers.speaker_of(utterance)
        said, kept = self.talkers.divided(utterance, generator)
        case = draw.uniform(0, 1)
        present = case >= mixing.absent
        alone = present and case < mixing.absent + mixing.alone
        others = () if alone else self._others(speaker, draw)
        pitch, *pitches = (draw.factor(mixing.pitch) for _ in (speaker, *others))

        dry = self.talkers.strung(said, self.samples, generator, pitch, mixing.mood)
        dry = dry * level(draw, mixing.level) / rms(dry)
        spoken = [
            self.talkers.passage(other, self.samples, generator, its, mixing.mood)
            for other, its in zip(others, pitches, strict=True)
        ]
        target, heard, interference = self._in_room(dry, spoken, draw)

        sir = draw.uniform(*mixing.sir) if others else math.inf
        interference = scaled(interference, heard, sir)
        snr, noise = math.inf, torch.zeros_like(heard)
        if mixing.snr is not None and not alone:
            snr = draw.uniform(*mixing.snr)
            noise = scaled(self.noise(self.samples, draw, speaker), heard, snr)
        if not present:
            target, heard = 0 * target, 0 * heard
        mixture = heard + interference + noise
        gain = headroom(mixture)
        return Mixture(
            mixture=gain * mixture,
            target=gain * target,
            interference=gain * interference,
            noise=gain * noise,
            enrolment=self.enrolment(kept, generator, pitch),
            speaker=speaker,
            interferers=others,
            sir=sir,
            snr=snr,
            present=present,
        )

    def enrolment(
        self, utterances: list[int], generator: torch.Generator, pitch: float = 1.0
    ) -> Tensor:
        """A recording of these utterances, which are of one speaker, (samples,)."""
        mixing, draw = self.mixing, Draw(generator)
        samples = round(draw.uniform(*mixing.enrolment_seconds) * RATE)
        clean = self.talkers.strung(utterances, samples, generator, pitch, mixing.mood)
        clean = clean * level(draw, mixing.level) / rms(clean)
        if mixing.snr is not None and draw.chance(mixing.enrolment_noise):
            noise = self.noise(samples, draw, self.talkers.speaker_of(utterances[0]))
            clean = clean + scaled(noise, clean, draw.uniform(*mixing.snr))
        return unclipped(clean)

    def noise(self, samples: int, draw: Draw, without: int) -> Tensor:
        """Noise of any loudness, without the voice of one speaker, (samples,)."""
        if self.noises is not None:
            return looped(self.noises.waveform(draw.below(len(self.noises))), samples, draw)
        if draw.chance(self.mixing.babble):
            return self.talkers.babble(BABBLERS, samples, draw.generator, without)
        return coloured_noise(samples, draw.uniform(0, 2), draw.generator)

    def _others(self, speaker: int, draw: Draw) -> tuple[int, ...]:
        least, most = self.mixing.interferers
        order = torch.randperm(len(self.talkers), generator=draw.generator).tolist()
        order.remove(speaker)
        return tuple(order[: least + draw.below(most - least + 1)])

    def _in_room(
        self, dry: Tensor, spoken: list[Tensor], draw: Draw
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is wanted of the target, what is heard of it, and what is heard of the others."""
        if not draw.chance(self.mixing.room):
            return dry, dry, sum(spoken, torch.zeros_like(dry))
        room = rooms.Room.drawn(draw.generator, self.mixing.t60)
        early, whole = self._response(room, draw)
        interference = torch.zeros_like(dry)
        for other in spoken:
            interference = interference + rooms.heard(other, self._response(room, draw)[1])
        return rooms.heard(dry, early), rooms.heard(dry, whole), interference

    def _response(self, room: rooms.Room, draw: Draw) -> tuple[Tensor, Tensor]:
        """Early and whole response from a random place; the early one keeps a sound's energy."""
        source = room.source(draw.generator)
        early, whole = rooms.impulse_response(room, source, draw.generator)
        norm = early.square().sum().sqrt()
        return early / norm, whole / norm


def level(draw: Draw, bounds: Range) -> float:
    """A root mean square from a range in dB of full scale."""
    return 10 ** (draw.uniform(*bounds) / 20)


def rms(waveform: Tensor) -> Tensor:
    """Root mean square; above zero also for silence, so that one may divide by it."""
    return waveform.square().mean().sqrt().clamp(min=1e-9)


def headroom(waveform: Tensor) -> float:
    """The factor, one at most, that keeps a sound from clipping."""
    return min(1.0, HIGHEST_PEAK / max(float(waveform.abs().amax()), 1e-9))


def unclipped(waveform: Tensor) -> Tensor:
    """A sound, scaled down if it would clip."""
    return headroom(waveform) * waveform


def scaled(noise: Tensor, signal: Tensor, snr: float) -> Tensor:
    """Noise made so loud that the signal has `snr` dB to it: by sqrt(P_s / (P_n 10^(snr / 10)))."""
    return noise * (rms(signal) / rms(noise) * 10 ** (-snr / 20))


def coloured_noise(samples: int, exponent: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise with power 1 / f^exponent above 20 Hz, and none below, (samples,)."""
    spectrum = torch.fft.rfft(torch.randn(samples, generator=generator))
    frequency = torch.fft.rfftfreq(samples, 1 / RATE)
    shape = torch.where(frequency < 20, 0, frequency.clamp(min=20) ** (-exponent / 2))
    noise = torch.fft.irfft(spectrum * shape, samples)
    return noise / rms(noise)


def looped(waveform: Tensor, samples: int, draw: Draw) -> Tensor:
    """A passage of a recording, begun anywhere, and begun again at its end, (samples,)."""
    start = draw.below(len(waveform))
    repeats = math.ceil((start + samples) / len(waveform))
    return waveform.repeat(repeats)[start : start + samples]
