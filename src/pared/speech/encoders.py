"""What all trainings of speech encoders share: inputs, conversions by a recipe, a saved folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor
from transformers import SequenceFeatureExtractor

from pared import checkpoint
from pared.errors import InputError
from pared.method import convert, parse, stack_of

if TYPE_CHECKING:
    from pared.method import Conversion
    from pared.recipe import ModelTable, Recipe

# Makes a model of random weights from a recipe's table.
Build = Callable[["ModelTable"], Any]


def extractor_of(path: str) -> Any:
    """A feature extractor of transformers with its usual settings, and masks for the padding.

    Raises:
        InputError: there is none of that name.
    """
    library, _, name = path.rpartition(".")
    found = getattr(transformers, name, None) if library == "transformers" else None
    if not isinstance(found, type) or not issubclass(found, SequenceFeatureExtractor):
        raise InputError(
            f"there is no feature extractor {path!r}; give one such as "
            "transformers.Wav2Vec2FeatureExtractor."
        )
    return cast(Any, found)(return_attention_mask=True)


def check_reads(recipe: Recipe, model_class: Any) -> None:
    """Refuse a model that can't read what the recipe's extractor makes.

    Raises:
        InputError: it reads something else.
    """
    made = extractor_of(recipe.data.extractor).model_input_names
    if (reads := model_class.main_input_name) not in made:
        raise InputError(
            f"{recipe.model.class_} reads {reads}, which {recipe.data.extractor} doesn't make; "
            "name its own in data.extractor."
        )


def convert_by(table: ModelTable, model: Any) -> None:
    """Convert a model by the methods that a recipe's table names, their new weights from its seed.

    Training it makes no gradients of the sound any more.
    """
    torch.manual_seed(table.seed)
    methods = [cast("Conversion", parse(spec)) for spec in table.methods]
    if methods:
        convert(model, *methods)
    spare_the_sound(model)


def spare_the_sound(model: Any) -> None:
    """Have no gradients made of the sound itself.

    transformers asks for them in case layers are recomputed the old way. Nobody reads them, and
    they are a tenth of a small model's step; where the first convolution is fixed, a third.
    """
    for module in model.modules():
        if hasattr(module, "_requires_grad"):
            module._requires_grad = False


def inputs_of(extractor: Any, sounds: list[Tensor], name: str) -> dict[str, Tensor]:
    """What a model reads of sounds, float (samples,) each, with their lengths and padding mask.

    Args:
        extractor: of transformers.
        sounds: at its rate.
        name: of the model's input, `input_values` or `input_features`.
    """
    found = extractor(
        [sound.numpy() for sound in sounds],
        sampling_rate=extractor.sampling_rate,
        padding=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = found["attention_mask"].long()
    return {name: found[name], "input_lengths": mask.sum(dim=-1), "attention_mask": mask}


def save(model: Any, folder: str | Path, *parts: Any) -> None:
    """Write an ordinary transformers folder; a converted model gets its `pared.json`.

    Args:
        model: stock or converted.
        folder: to write.
        parts: extractor and tokenizer that go with it.
    """
    if stack_of(model):
        checkpoint.save(model, folder)
    else:
        model.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
