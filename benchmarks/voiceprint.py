"""A speaker's embedding from another encoder, which the arm `static_vector` is told: an x-vector.

Snyder et al. 2018: convolutions over time, mean and deviation over the whole recording, then the
layer below the classes of a network that tells speakers apart. Here it learns the training voices
that the enhancers learn from, and stays as it is afterwards.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pared.objectives.enhancement import magnitudes, spectra
from pared.training import TrainingSettings, train
from pared.worlds.speech.data import EnhancementData
from pared.worlds.speech.mixtures import rms

WIDTH, BINS = 128, 257


class VoicePrint(nn.Module):
    """Recordings to embeddings.

    Args:
        speakers: that it learns to tell apart.
    """

    def __init__(self, speakers: int) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            nn.Conv1d(BINS, WIDTH, 5),
            nn.GELU(),
            nn.Conv1d(WIDTH, WIDTH, 3, dilation=2),
            nn.GELU(),
            nn.Conv1d(WIDTH, WIDTH, 3, dilation=3),
            nn.GELU(),
        )
        self.embed = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.classes = nn.Linear(WIDTH, speakers)

    def forward(self, sounds: Tensor, samples: Tensor | None = None) -> Tensor:
        """Embeddings (batch, WIDTH) of recordings (batch, longest), padded after `samples`."""
        ends = [sounds.shape[1]] * len(sounds) if samples is None else samples.tolist()
        pooled = []
        for sound, end in zip(sounds, ends, strict=True):
            heard = sound[:end]
            found = self.frames(magnitudes(spectra(heard[None] / rms(heard))))
            pooled.append(torch.cat([found.mean(dim=2), found.std(dim=2)], dim=1))
        return self.norm(self.embed(torch.cat(pooled)))


@dataclass
class Voices:
    """Enrolments as `data` draws them, but at the voices' own pitch, and who speaks."""

    data: EnhancementData

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        talkers, sounds, speakers = self.data.mixer.talkers, [], []
        for index in indices.tolist():
            speakers.append(talkers.speaker_of(index))
            own = talkers.utterances[speakers[-1]]
            order = torch.randperm(len(own), generator=generator).tolist()
            sounds.append(self.data.mixer.enrolment([own[place] for place in order], generator))
        return {
            "sounds": pad_sequence(sounds, batch_first=True),
            "samples": torch.tensor([len(sound) for sound in sounds]),
            "speakers": torch.tensor(speakers),
        }

    def identity(self) -> str:
        return self.data.identity()


class TellingApart(nn.Module):
    """Cross-entropy of the speakers."""

    def forward(
        self, model: VoicePrint, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        scores = model.classes(model(batch["sounds"], batch["samples"]))
        return {"speakers": nn.functional.cross_entropy(scores, batch["speakers"])}


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
        drawn["enrolment"] = self.voiceprint(drawn["enrolment"], drawn.pop("enrolment_samples"))
        return drawn

    def identity(self) -> str:
        told = hashlib.sha256(self.data.identity().encode())
        for weight in self.voiceprint.state_dict().values():
            told.update(weight.numpy().tobytes())
        return told.hexdigest()[:16]


def learnt(data: EnhancementData, folder: Path, steps: int) -> VoicePrint:
    """A voice print of the voices in `data`, on the CPU; resumes what lies in the folder."""
    torch.manual_seed(0)
    voiceprint = VoicePrint(len(data.mixer.talkers))
    settings = TrainingSettings(
        steps=steps,
        batch_size=16,
        learning_rate=1e-3,
        schedule="cosine",
        weight_decay=0.01,
        log_every=min(steps, 10),
    )
    if not train(voiceprint, TellingApart(), Voices(data), settings, folder).finished:
        raise SystemExit(130)
    return voiceprint.cpu().eval().requires_grad_(False)
