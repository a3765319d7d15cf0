"""An enhancer by a recipe: what `pared train` does where the data are mixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import InputError
from pared.objectives.enhancement import Enhancement
from pared.speech.streaming_pse.method import StreamingPSE
from pared.speech.streaming_pse.model import StreamingPSEModel, load
from pared.training import train
from pared.training.processes import saved_once
from pared.worlds.house import folder_of
from pared.worlds.readers.speech import read_noises
from pared.worlds.speech.data import EnhancementData
from pared.worlds.speech.sources import check_counts, utterances
from pared.worlds.speech.talkers import enrollable

if TYPE_CHECKING:
    from pared.recipe import DataTable, ModelTable, Recipe
    from pared.training import Dataset

# Makes a model of random weights from a recipe's table.
Build = Callable[["ModelTable"], Any]


def check(recipe: Recipe, model_class: Any) -> None:
    """Refuse what can be refused before any utterance is spoken or read.

    Args:
        recipe: whose data are mixtures.
        model_class: that it names; None where it starts from a saved model.

    Raises:
        InputError: the message names what can't be.
    """
    table = recipe.model
    check_counts(recipe.data.source, recipe.data.utterances)
    if model_class is None:
        settings = load(folder_of(str(table.from_))).settings
    elif model_class is StreamingPSE:
        settings = StreamingPSE(**table.config)
    else:
        raise InputError(f"{table.class_} is no enhancer; give pared.StreamingPSE.")
    if settings.conditioning == "static_vector":
        raise InputError(
            "conditioning=static_vector learns from another encoder's embeddings, which a recipe "
            "doesn't bring; give cross, static_mean or none."
        )


def run(recipe: Recipe, folder: Path, build: Build) -> StreamingPSEModel | None:
    """Train, and save an ordinary transformers folder.

    Args:
        recipe: whose data are mixtures.
        folder: see `pared.recipe.run`.
        build: see `Build`.

    Returns:
        The enhancer, or None when the run was interrupted.
    """
    start = recipe.model.from_
    model = build(recipe.model) if start is None else load(folder_of(start))
    if not taught(model, data_of(recipe.data), recipe, folder):
        return None
    saved_once(folder / "model", model.save_pretrained)
    return model


def taught(model: StreamingPSEModel, data: Dataset, recipe: Recipe, folder: Path) -> bool:
    """Train a model by all stages of a recipe; False when that was interrupted.

    Args:
        model: is trained in place.
        data: see `pared.objectives.enhancement.Enhancement`.
        recipe: of its stages and its objective.
        folder: takes a sub-folder per stage.
    """
    for number, stage in enumerate(recipe.stages, start=1):
        objective = Enhancement(**recipe.objective_of(stage).settings)
        place = folder / f"stage-{number}"
        if not train(model, objective, data, stage.training, place).finished:
            return False
    return True


def data_of(table: DataTable, split: str | None = None) -> EnhancementData:
    """Mixtures as a recipe's table describes them.

    Args:
        table: of kind mixtures; `on_bad` goes for recordings that can't be used, and for speakers
            of whom there is only one.
        split: of the voices; by default the table's.

    Raises:
        InputError: voices or noises can't be read, or can't be mixed so.
    """
    noises = None if table.noises is None else read_noises(table.noises, table.on_bad)
    said = utterances(table.source, split or table.split, table.utterances, table.on_bad)
    heard = enrollable(said, table.source, table.on_bad)
    return EnhancementData(heard, table.mixing, table.seconds, noises)
