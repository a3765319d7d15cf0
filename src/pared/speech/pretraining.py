"""A speech encoder from recordings alone, by a recipe: what `pared train` does with `recordings`.

What is saved is an ordinary transformers folder of the pre-training class, with the extractor that
makes its inputs. `pared.speech.probing` tells what its layers know.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pared.errors import InputError
from pared.objectives.ctc import frame_lengths
from pared.objectives.wav2vec2 import Wav2Vec2Pretraining
from pared.speech.encoders import (
    Build,
    check_reads,
    convert_by,
    extractor_of,
    inputs_of,
    save,
)
from pared.speech.recognition.filterbank import start_as_filterbank
from pared.training import train
from pared.training.processes import saved_once
from pared.worlds.draws import Draw
from pared.worlds.readers.items import report
from pared.worlds.speech.audio import RATE
from pared.worlds.speech.sources import check_counts, utterances

if TYPE_CHECKING:
    from pared.recipe import ModelTable, Recipe
    from pared.worlds.readers.speech import Corpus
    from pared.worlds.speech.world import Speech


def check(recipe: Recipe, model_class: Any) -> None:
    """Refuse what can be refused before any utterance is spoken or read.

    Args:
        recipe: whose data are recordings.
        model_class: that it names; None where it starts from a folder.

    Raises:
        InputError: the message names what can't be.
    """
    check_counts(recipe.data.source, recipe.data.utterances)
    if model_class is None or not hasattr(model_class, "set_gumbel_temperature"):
        raise InputError(
            f"{recipe.model.class_ or recipe.model.from_} can't be pre-trained; give a class such "
            "as transformers.Wav2Vec2ConformerForPreTraining."
        )
    check_reads(recipe, model_class)


def run(recipe: Recipe, folder: Path, build: Build) -> Any:
    """Train, and save an ordinary transformers folder with the extractor.

    Args:
        recipe: whose data are recordings.
        folder: see `pared.recipe.run`.
        build: see `Build`.

    Returns:
        The model, or None when the run was interrupted.
    """
    table = recipe.data
    heard = utterances(table.source, table.split or "train", table.utterances, table.on_bad)
    extractor = extractor_of(table.extractor)
    model = started(recipe.model, build, extractor.sampling_rate)
    data = PretrainingData(heard, extractor, table.seconds)
    for number, stage in enumerate(recipe.stages, start=1):
        objective = Wav2Vec2Pretraining(**recipe.objective_of(stage).settings)
        data.leave_out_short(model, objective.span, table.source, table.on_bad)
        place = folder / f"stage-{number}"
        if not train(model, objective, data, stage.training, place).finished:
            return None
    saved_once(folder / "model", lambda place: save(model, place, extractor))
    return model


def started(table: ModelTable, build: Build, rate: int = RATE) -> Any:
    """A model of random weights, converted by the methods that the table names.

    Args:
        table: class, configuration and methods.
        build: see `Build`.
        rate: samples per second that it reads.
    """
    model = build(table)
    start_as_filterbank(model, rate)
    convert_by(table, model)
    return model


@dataclass
class PretrainingData:
    """Batches as `Wav2Vec2Pretraining` takes them, of utterances of similar length.

    Longer utterances are cut, at a place drawn anew every time.

    Attributes:
        speech: utterances; their transcripts aren't read.
        extractor: what makes the inputs.
        seconds: length at which utterances are cut.
        indices: of the utterances that are used, where not all are.
    """

    speech: Speech | Corpus
    extractor: Any
    seconds: float
    indices: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.indices = list(range(len(self.speech)))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def most(self) -> int:
        """Samples at which utterances are cut."""
        return round(self.seconds * RATE)

    @property
    def lengths(self) -> list[int]:
        """Samples of the utterances once cut."""
        lengths = list(self.speech.lengths)
        return [min(lengths[index], self.most) for index in self.indices]

    def leave_out_short(self, model: Any, least: int, source: str, on_bad: str) -> None:
        """Leave out what has fewer than `least` frames, in which no span can be hidden.

        Args:
            model: that makes the frames.
            least: see above.
            source: what the user asked to read, for messages.
            on_bad: "refuse" or "skip" such utterances.

        Raises:
            InputError: there are some, and they are to be refused.
        """
        frames = frame_lengths(model, torch.tensor(self.lengths)).tolist()
        short = [(i, n) for i, n in zip(self.indices, frames, strict=True) if n < least]
        if short:
            faults = [f"number {i} (has {n} frames, and masks hide {least})" for i, n in short]
            report(source, faults, len(self.indices), on_bad, f"{least} frames")
            out = {index for index, _ in short}
            self.indices = [index for index in self.indices if index not in out]

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Wav2Vec2Pretraining`."""
        draw = Draw(generator)
        sounds = []
        for index in indices.tolist():
            sound = self.speech.waveform(self.indices[index])
            start = draw.below(max(len(sound) - self.most, 0) + 1)
            sounds.append(sound[start : start + self.most])
        return inputs_of(self.extractor, sounds, "input_values")

    def identity(self) -> str:
        told = self.speech.identity(), self.indices, self.seconds, self.extractor.to_json_string()
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
