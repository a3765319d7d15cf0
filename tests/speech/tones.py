"""Voices made of harmonic tones: everyone has a pitch and says four vowels in their own way.

Nobody is heard twice: voices are drawn anew for every mixture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RATE = SAMPLES = 16_000
HARMONICS = 12
VOWELS = 4
SYLLABLES = 8  # in a recording, voiced or not


@dataclass
class Voices:
    """Several of them: pitch (voices,) in hertz, vowels (voices, VOWELS, HARMONICS)."""

    pitch: Tensor
    vowels: Tensor

    def recording(self, generator: torch.Generator) -> Tensor:
        """One recording of each voice, all equally loud, (voices, samples)."""
        count = len(self.pitch)
        said = torch.randint(VOWELS, (count, SYLLABLES), generator=generator)
        voiced = torch.rand(count, SYLLABLES, 1, generator=generator) > 0.3
        loudness = self.vowels.gather(1, said[..., None].expand(-1, -1, HARMONICS)) * voiced
        loudness = torch.nn.functional.interpolate(loudness.mT, SAMPLES, mode="linear")
        # Each vowel has a melody: above the pitch or below it.
        height = 1 + 0.08 * (said / (VOWELS - 1) - 0.5)
        height = torch.nn.functional.interpolate(height[:, None], SAMPLES, mode="linear")[:, 0]
        phase = (2 * torch.pi * self.pitch[:, None] * height / RATE).cumsum(dim=1)
        harmonic = torch.arange(1, HARMONICS + 1)[:, None]
        wave = (loudness * torch.sin(harmonic * phase[:, None])).sum(dim=1)
        return 0.05 * wave / wave.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-3)


def batch(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Mixtures of two voices at 0 dB, with other recordings of both as enrolments.

    As `pared.worlds.speech.data.EnhancementData` gives it, with `other_enrolment`.
    """
    low = 90 + 80 * torch.rand(size, generator=generator)
    high = low * (1.3 + 0.4 * torch.rand(size, generator=generator))
    swap = torch.rand(size, generator=generator) < 0.5
    vowels = torch.rand(2, size, VOWELS, HARMONICS, generator=generator) ** 3
    one = Voices(torch.where(swap, low, high), vowels[0])
    two = Voices(torch.where(swap, high, low), vowels[1])
    target, other = one.recording(generator), two.recording(generator)
    return {
        "mixture": target + other,
        "target": target,
        "interference": other,
        "enrolment": one.recording(generator),
        "other_enrolment": two.recording(generator),
    }
