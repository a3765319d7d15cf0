"""Voices made of harmonic tones, each with its pitch and its formants; syllables come at random."""

import torch
from torch import Tensor

RATE = SAMPLES = 16_000
HARMONICS = 12
SYLLABLES = 8  # in a recording, voiced or not


class Tones:
    """Mixtures of two voices at 0 dB, with other recordings of both as enrolments."""

    def __init__(self, voices: int = 6) -> None:
        generator = torch.Generator().manual_seed(7)
        self.pitch = torch.linspace(90, 270, voices)
        self.formants = torch.rand(voices, HARMONICS, generator=generator) ** 2 + 0.02

    def recording(self, voices: Tensor, generator: torch.Generator) -> Tensor:
        """One recording of each voice, all equally loud, (batch, samples)."""
        batch = len(voices)
        moment = torch.arange(SAMPLES) / RATE
        drift = 1 + 0.04 * torch.rand(batch, 1, generator=generator) * torch.sin(
            2 * torch.pi * (moment * (1 + torch.rand(batch, 1, generator=generator)))
        )
        phase = (2 * torch.pi * self.pitch[voices, None] * drift / RATE).cumsum(dim=1)
        harmonic = torch.arange(1, HARMONICS + 1)[:, None]
        # Each syllable is voiced or not, and has a vowel of its own.
        vowel = torch.rand(batch, HARMONICS, SYLLABLES, generator=generator)
        voiced = torch.rand(batch, 1, SYLLABLES, generator=generator) > 0.3
        loudness = self.formants[voices, :, None] * (0.5 + vowel) * voiced
        loudness = torch.nn.functional.interpolate(loudness, SAMPLES, mode="linear")
        wave = (loudness * torch.sin(harmonic * phase[:, None])).sum(dim=1)
        return 0.05 * wave / wave.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-3)

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """As `pared.worlds.speech.data.EnhancementData` gives it, with `other_enrolment`."""
        count = len(self.pitch)
        voices = torch.randint(count, (size,), generator=generator)
        others = (voices + torch.randint(1, count, (size,), generator=generator)) % count
        target, other = (self.recording(each, generator) for each in (voices, others))
        return {
            "noisy": target + other,
            "target": target,
            "interference": other,
            "enrolment": self.recording(voices, generator),
            "other_enrolment": self.recording(others, generator),
        }
