"""A recogniser by a recipe: what `pared train` does where the data are transcripts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import InputError
from pared.objectives.ctc import CTC
from pared.speech.encoders import Build, check_reads, convert_by, extractor_of
from pared.speech.recognition.data import RecognitionData, characters_of
from pared.speech.recognition.filterbank import start_as_filterbank
from pared.speech.recognition.model import Recogniser, check_folder, load
from pared.speech.recognition.pretrained import check_changes, is_pretrained, recogniser_on
from pared.speech.recognition.vocabulary import characters_in, tokenizer_of
from pared.training import train
from pared.training.precision import in_float32
from pared.training.processes import saved_once
from pared.worlds.house import folder_of
from pared.worlds.readers.speech import read_noises
from pared.worlds.speech.characters import BLANK, Characters
from pared.worlds.speech.data import TranscriptData
from pared.worlds.speech.sources import check_counts, utterances

if TYPE_CHECKING:
    from pared.recipe import ModelTable, Recipe
    from pared.worlds.readers.speech import Corpus
    from pared.worlds.speech.world import Speech


def check(recipe: Recipe, model_class: Any) -> None:
    """Refuse what can be refused before any utterance is spoken or read.

    Args:
        recipe: whose data are transcripts.
        model_class: that it names; None where it starts from a folder.

    Raises:
        InputError: the message names what can't be.
    """
    check_counts(recipe.data.source, recipe.data.utterances)
    if model_class is None:
        _check_start(Path(folder_of(str(recipe.model.from_))), recipe.model.config)
        return
    if not model_class.__name__.endswith("ForCTC"):
        raise InputError(
            f"{recipe.model.class_} is not trained with CTC; give a class such as "
            "transformers.Wav2Vec2ConformerForCTC."
        )
    check_reads(recipe, model_class)


def _check_start(folder: Path, changes: dict[str, Any]) -> None:
    if is_pretrained(folder):
        check_changes(folder, changes)
        return
    check_folder(folder, "a saved CTC model or a pretrained speech encoder")
    if changes:
        raise InputError(
            f"{folder} holds a CTC model, which keeps its configuration; leave model.config out."
        )


def run(recipe: Recipe, folder: Path, build: Build) -> Recogniser | None:
    """Train, and save an ordinary transformers folder with extractor and tokenizer.

    It trains in float32; a saved recogniser of another type is written in its own again.

    Args:
        recipe: whose data are transcripts.
        folder: see `pared.recipe.run`.
        build: see `Build`.

    Returns:
        The recogniser, or None when the run was interrupted.
    """
    table = recipe.data
    noises = None if table.noises is None else read_noises(table.noises, table.on_bad)
    said = utterances(table.source, table.split, table.utterances, table.on_bad)
    recogniser = _begun(recipe, said, build)
    characters = characters_in(recogniser.tokenizer, recogniser.model.config.vocab_size)
    heard = TranscriptData(said, characters, snr=table.snr, noises=noises)
    data = RecognitionData(heard, recogniser, list(said.lengths))
    data.leave_out_unsayable(table.source, table.on_bad)
    with in_float32(recogniser.model):  # whatever type a saved one has
        for number, stage in enumerate(recipe.stages, start=1):
            place = folder / f"stage-{number}"
            if not train(recogniser.model, CTC(), data, stage.training, place).finished:
                return None
    saved_once(folder / "model", recogniser.save)
    return recogniser


def _begun(recipe: Recipe, said: Speech | Corpus, build: Build) -> Recogniser:
    """What the training begins with: random weights, a saved recogniser, or a saved encoder."""
    table, data = recipe.model, recipe.data
    if table.from_ is None:
        characters = characters_of(data.source, said)
        return started(table, build, extractor_of(data.extractor), characters)
    folder = Path(folder_of(table.from_))
    if not is_pretrained(folder):
        return converted(load(folder), table)
    characters = characters_of(data.source, said)
    return converted(recogniser_on(folder, table.config, characters, table.seed), table)


def started(table: ModelTable, build: Build, extractor: Any, characters: Characters) -> Recogniser:
    """A recogniser of random weights, converted by the methods that the table names.

    Args:
        table: the class and its configuration, without what follows from the alphabet.
        build: see `Build`.
        extractor: what makes its inputs.
        characters: the alphabet.
    """
    classes = {"vocab_size": len(characters), "pad_token_id": BLANK}
    model = build(table.model_copy(update={"config": table.config | classes}))
    if model.main_input_name == "input_values":
        start_as_filterbank(model, extractor.sampling_rate)
    return converted(Recogniser(model, extractor, tokenizer_of(characters)), table)


def converted(recogniser: Recogniser, table: ModelTable) -> Recogniser:
    """The same with the methods that a recipe's table names, their new weights from its seed."""
    convert_by(table, recogniser.model)
    return recogniser
