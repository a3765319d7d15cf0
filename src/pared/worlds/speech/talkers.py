"""Speakers as sources of endless speech: their utterances, strung together with pauses."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pared.errors import InputError
from pared.worlds.draws import Draw
from pared.worlds.readers.items import report
from pared.worlds.speech.audio import RATE

PAUSE = (0.1, 0.6)  # seconds between utterances
STEADY = (1.0, 1.0)  # everything in one mood


class Utterances(Protocol):
    """What the speech world and users' corpora have in common; entry i belongs together.

    `transcripts` and `speakers` are None where they aren't known.
    """

    @property
    def transcripts(self) -> list[str] | list[str | None]: ...

    @property
    def speakers(self) -> list[str] | list[str | None]: ...

    def __len__(self) -> int: ...

    def waveform(self, index: int) -> Tensor:
        """Float32 (samples,) in [-1, 1], mono, at 16 kHz."""
        ...

    def identity(self) -> str:
        """A short text that changes when the utterances change."""
        ...


@dataclass(frozen=True)
class Chosen:
    """Some utterances of a corpus, by their numbers in it.

    Attributes:
        speech: the corpus.
        indices: what is taken of it, in order.
    """

    speech: Utterances
    indices: list[int]

    @property
    def transcripts(self) -> list[str | None]:
        """What is said; None where it isn't known."""
        transcripts = self.speech.transcripts
        return [transcripts[index] for index in self.indices]

    @property
    def speakers(self) -> list[str | None]:
        """Who says it; None where it isn't known."""
        speakers = self.speech.speakers
        return [speakers[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def waveform(self, index: int) -> Tensor:
        """See `Utterances`."""
        return self.speech.waveform(self.indices[index])

    def identity(self) -> str:
        """A short text that changes when the corpus or the choice changes."""
        told = self.speech.identity(), self.indices
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


class Talkers:
    """The speakers of a corpus, by number in the order in which they occur.

    Args:
        speech: the utterances.

    Raises:
        InputError: it isn't known who speaks.
    """

    def __init__(self, speech: Utterances) -> None:
        self.speech = speech
        by_name: dict[str, list[int]] = defaultdict(list)
        for index, speaker in enumerate(speech.speakers):
            if speaker is None:
                raise InputError(
                    f"utterance {index} has no speaker; mixtures need to know who speaks."
                )
            by_name[speaker].append(index)
        self.names = list(by_name)
        self.utterances = list(by_name.values())
        self._speaker = {i: number for number, own in enumerate(self.utterances) for i in own}

    def __len__(self) -> int:
        return len(self.names)

    def need_enrolment(self) -> None:
        """See that everyone has an utterance to be enrolled by beside the one to be heard.

        Raises:
            InputError: somebody hasn't.
        """
        for name, own in zip(self.names, self.utterances, strict=True):
            if len(own) < 2:
                raise InputError(
                    f"the speaker {name!r} has only one utterance; enrolment takes another one, so "
                    "each speaker needs two at least."
                )

    def only_ones(self) -> list[int]:
        """Utterances whose speakers have no other."""
        return [own[0] for own in self.utterances if len(own) == 1]

    def speaker_of(self, utterance: int) -> int:
        """The number of who says an utterance."""
        return self._speaker[utterance]

    def divided(self, utterance: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """All utterances of a speaker in two random halves, the first led by `utterance`."""
        own = self.utterances[self._speaker[utterance]]
        order = torch.randperm(len(own), generator=generator).tolist()
        others = [own[place] for place in order if own[place] != utterance]
        half = len(others) // 2
        return [utterance, *others[:half]], others[half:]

    def strung(
        self,
        utterances: list[int],
        samples: int,
        generator: torch.Generator,
        pitch: float = 1.0,
        mood: tuple[float, float] = STEADY,
    ) -> Tensor:
        """These utterances in turn, again from the first where they don't suffice, (samples,).

        They begin somewhere in the first half of the first one. `pitch` makes somebody else of the
        speaker, see `pitched`; of `mood` each utterance has a factor of its own beside.
        """
        draw, pieces = Draw(generator), list[Tensor]()
        length = turn = 0
        while length < samples:
            said = self.speech.waveform(utterances[turn % len(utterances)])
            piece = pitched(said, pitch * draw.factor(mood))
            if not pieces:
                piece = piece[int(draw.uniform(0, 1) / 2 * len(piece)) :]
            pieces += [piece, torch.zeros(round(draw.uniform(*PAUSE) * RATE))]
            length += len(pieces[-1]) + len(piece)
            turn += 1
        return torch.cat(pieces)[:samples]

    def passage(
        self,
        speaker: int,
        samples: int,
        generator: torch.Generator,
        pitch: float = 1.0,
        mood: tuple[float, float] = STEADY,
    ) -> Tensor:
        """Anything that a speaker says, (samples,); see `strung`."""
        own = self.utterances[speaker]
        order = torch.randperm(len(own), generator=generator).tolist()
        return self.strung([own[place] for place in order], samples, generator, pitch, mood)

    def babble(
        self, voices: int, samples: int, generator: torch.Generator, without: int = -1
    ) -> Tensor:
        """Several speakers at once, each as loud as the others, none `without`, (samples,)."""
        others = [number for number in range(len(self)) if number != without]
        drawn = torch.randint(len(others), (voices,), generator=generator).tolist()
        speakers = [others[number] for number in drawn]
        tracks = torch.stack([self.passage(one, samples, generator) for one in speakers])
        return (tracks / tracks.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-9)).sum(0)


def enrollable(speech: Utterances, source: str, on_bad: str) -> Utterances:
    """Leave out who has one utterance alone: enrolment takes another than the one to be heard.

    Args:
        speech: whose speakers are known.
        source: what the user asked to read, for messages.
        on_bad: "refuse" or "skip" such speakers.

    Raises:
        InputError: there are some, and they are to be refused; there is nobody else; or it isn't
            known who speaks.
    """
    alone = Talkers(speech).only_ones()
    if not alone:
        return speech
    speakers = speech.speakers
    faults = [f"number {n} (the only one of the speaker {speakers[n]!r})" for n in alone]
    report(source, faults, len(speech), on_bad, "another of its speaker to enrol by")
    return Chosen(speech, sorted(set(range(len(speech))) - set(alone)))


def pitched(waveform: Tensor, factor: float) -> Tensor:
    """A recording played faster: (samples,) to (samples / factor,).

    All frequencies grow by the factor, those of the throat and those of the mouth, so it sounds as
    somebody smaller. Linear interpolation, which is quick enough for every mixture: what is raised
    beyond half the rate folds back, for a factor of 1.25 what was above 6.4 kHz, where speech has
    little.
    """
    if factor == 1:
        return waveform
    samples = max(1, round(len(waveform) / factor))
    return interpolate(waveform[None, None], samples, mode="linear")[0, 0]
