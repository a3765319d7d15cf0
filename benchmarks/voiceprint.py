"""A speaker's embedding from another encoder, which the arm `static_vector` is told: an x-vector.

Snyder et al. 2018: convolutions over time, mean and deviation over the whole recording, then the
layer below the classes of a network that tells speakers apart, with batch norms throughout. Here it
learns the training voices that the enhancers learn from, raised and lowered like theirs: a voice
raised by much counts as another one. Afterwards it stays as it is.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pared.objectives.enhancement import magnitudes, spectra
from pared.training import TrainingSettings, train
from pared.worlds.speech.data import EnhancementData

WIDTH, BINS = 128, 257
# Voices that raising and lowering makes of one.
PITCHES = 4


class VoicePrint(nn.Module):
    """Recordings to embeddings.

    Args:
        voices: that it learns to tell apart.
    """

    def __init__(self, voices: int) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            nn.BatchNorm1d(BINS),
            *_frames(BINS, 5, 1),
            *_frames(WIDTH, 3, 2),
            *_frames(WIDTH, 3, 3),
        )
        self.embed = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.classes = nn.Linear(WIDTH, voices)

    def forward(self, sounds: Tensor) -> Tensor:
        """Embeddings (batch, WIDTH) of recordings of one length (batch, samples)."""
        loudness = sounds.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-9)
        found = self.frames(magnitudes(spectra(sounds / loudness)))
        return self.norm(self.embed(torch.cat([found.mean(dim=2), found.std(dim=2)], dim=1)))


def _frames(channels: int, kernel: int, dilation: int) -> tuple[nn.Module, ...]:
    """A layer over time."""
    conv = nn.Conv1d(channels, WIDTH, kernel, dilation=dilation)
    return conv, nn.BatchNorm1d(WIDTH), nn.GELU()


@dataclass
class Voices:
    """Enrolments as `data` draws them, cut to one length, and whose they are."""

    data: EnhancementData

    def __len__(self) -> int:
        return len(self.data)

    @property
    def voices(self) -> int:
        """How many there are to tell apart."""
        return PITCHES * len(self.data.mixer.talkers)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`sounds` (batch, samples) and `voices` (batch,)."""
        talkers, (low, high) = self.data.mixer.talkers, self.data.mixer.mixing.pitch
        sounds, voices = [], []
        for index in indices.tolist():
            speaker = talkers.speaker_of(index)
            own = talkers.utterances[speaker]
            order = torch.randperm(len(own), generator=generator).tolist()
            raised = float(torch.rand((), generator=generator))
            pitch = low + raised * (high - low)
            utterances = [own[place] for place in order]
            sounds.append(self.data.mixer.enrolment(utterances, generator, pitch))
            voices.append(PITCHES * speaker + min(int(PITCHES * raised), PITCHES - 1))
        shortest = min(map(len, sounds))
        return {
            "sounds": torch.stack([sound[:shortest] for sound in sounds]),
            "voices": torch.tensor(voices),
        }

    def identity(self) -> str:
        return f"{self.data.identity()}-voices"


class TellingApart(nn.Module):
    """Cross-entropy of the voices."""

    def forward(
        self, model: VoicePrint, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        scores = model.classes(model(batch["sounds"]))
        return {"voices": nn.functional.cross_entropy(scores, batch["voices"])}


@dataclass
class Embedded:
    """The same mixtures, with embeddings in the place of enrolments."""

    data: EnhancementData
    voiceprint: VoicePrint

    def __len__(self) -> int:
        return len(self.data)

    @torch.no_grad()
    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = self.data.batch(indices, generator)
        ends = drawn.pop("enrolment_samples").tolist()
        heard = zip(drawn["enrolment"], ends, strict=True)
        drawn["enrolment"] = torch.cat([self.voiceprint(one[None, :end]) for one, end in heard])
        return drawn

    def identity(self) -> str:
        told = hashlib.sha256(self.data.identity().encode())
        for weight in self.voiceprint.state_dict().values():
            told.update(weight.numpy().tobytes())
        return told.hexdigest()[:16]


def learnt(data: EnhancementData, folder: Path, steps: int, seed: int) -> VoicePrint:
    """A voice print of the voices in `data`, on the CPU; resumes what lies in the folder."""
    torch.manual_seed(seed)
    voices = Voices(data)
    voiceprint = VoicePrint(voices.voices)
    settings = TrainingSettings(
        steps=steps,
        batch_size=32,
        learning_rate=2e-3,
        schedule="cosine",
        weight_decay=0.01,
        seed=seed,
        log_every=min(steps, 10),
        checkpoint_every=max(1, min(steps, 100)),
    )
    if not train(voiceprint, TellingApart(), voices, settings, folder).finished:
        raise SystemExit(130)
    return voiceprint.cpu().eval().requires_grad_(False)


@torch.no_grad()
def named(voiceprint: VoicePrint, data: EnhancementData, count: int = 256) -> float:
    """The share of its voices that it names rightly, in recordings drawn anew."""
    batch = Voices(data).batch(torch.arange(count) % len(data), torch.Generator().manual_seed(1))
    scores = voiceprint.classes(voiceprint(batch["sounds"]))
    return float((scores.argmax(dim=1) == batch["voices"]).float().mean())
