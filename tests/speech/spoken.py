"""Eight voices of the speech world in mixtures of two at 0 dB, without noise and rooms."""

from pathlib import Path

import torch
from torch import Tensor

from pared.worlds.speech import audio, voices, world

SAMPLES = 24_000
LOUDNESS = 0.05


class Spoken:
    """Mixtures with other recordings of both voices as enrolments.

    Args:
        split: "train", or "validation" for the same voices with other sentences.
        folder: where what is spoken is kept.
    """

    def __init__(self, split: str, folder: Path) -> None:
        chosen = voices.VOICES["espeak-ng"]["train"][::4][:8]
        count = 900 if split == "train" else 200
        wanted = [r for r in world.requests("sentences", split, count) if r.voice in chosen]
        self.said: dict[voices.Voice, list[Tensor]] = {voice: [] for voice in chosen}
        for request, file in zip(wanted, voices.speak_all(wanted, folder), strict=True):
            waveform = audio.read_pcm(file)[0] / 32768
            if len(waveform) >= SAMPLES:
                self.said[request.voice].append(waveform)

    def recording(self, own: list[Tensor], number: int, generator: torch.Generator) -> Tensor:
        """A passage of one utterance."""
        start = int(torch.randint(len(own[number]) - SAMPLES + 1, (), generator=generator))
        passage = own[number][start : start + SAMPLES]
        return LOUDNESS * passage / passage.square().mean().sqrt()

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """As `pared.worlds.speech.data.EnhancementData` gives it, with `other_enrolment`."""
        drawn = []
        everyone = list(self.said.values())
        for _ in range(size):
            pair = torch.randperm(len(everyone), generator=generator)[:2].tolist()
            row = []
            for own in (everyone[number] for number in pair):
                # Heard and enrolled by different utterances.
                heard, enrolled = torch.randperm(len(own), generator=generator)[:2].tolist()
                row += [self.recording(own, number, generator) for number in (heard, enrolled)]
            drawn.append(row)
        target, enrolment, other, other_enrolment = map(torch.stack, zip(*drawn, strict=True))
        return {
            "mixture": target + other,
            "target": target,
            "interference": other,
            "enrolment": enrolment,
            "other_enrolment": other_enrolment,
        }
