"""A recogniser on an encoder that was trained otherwise, as from recordings alone, and saved.

The encoder keeps its weights, its configuration and the methods it was converted by; what stood
behind it, such as a quantiser, is left out, and a fresh layer scores the letters. What a recipe
says in `model.config` is laid over the configuration, where it changes no weight's shape. How many
frames training hides is not taken over: in pre-training it's most of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from pared import anatomy, checkpoint
from pared.anatomy.speech import AudioEncoder
from pared.errors import InputError
from pared.method import convert, stack_of
from pared.speech.recognition.model import UNUSED, Recogniser, extractor_in
from pared.speech.recognition.vocabulary import tokenizer_of
from pared.worlds.speech.characters import BLANK, Characters

# Entries of a configuration that are those of pre-training alone.
HIDDEN = "mask_time_prob"


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a speech encoder that scores no letters yet, by its configuration."""
    try:
        _, name = checkpoint.class_of(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError):
        return False
    family = anatomy.families().get(name)
    return family is not None and issubclass(family, AudioEncoder) and not name.endswith("ForCTC")


def check_changes(folder: Path, changes: Mapping[str, Any]) -> None:
    """Refuse entries that the configuration of a recogniser on this encoder doesn't have.

    Args:
        folder: of the encoder, see `is_pretrained`.
        changes: to its configuration.

    Raises:
        InputError: the first of them is named.
    """
    config = json.loads((folder / "config.json").read_text())
    cls = _ctc_class(config["model_type"])
    if unknown := sorted(set(changes) - set(cls.config_class().to_dict())):
        raise InputError(
            f"model.config: a {cls.__name__} has no entry {unknown[0]!r}; leave it out."
        )


def recogniser_on(
    folder: Path, changes: Mapping[str, Any], characters: Characters, seed: int
) -> Recogniser:
    """A recogniser whose encoder is the saved one, and whose scores of letters are random.

    Args:
        folder: of the encoder, see `is_pretrained`.
        changes: to its configuration.
        characters: the alphabet.
        seed: of the layer that scores.

    Raises:
        InputError: the folder is damaged, or a change doesn't fit its weights.
    """
    known = checkpoint.load(folder)
    cls = _ctc_class(known.config.model_type)
    usual = getattr(cls.config_class(), HIDDEN)
    classes = {"vocab_size": len(characters), "pad_token_id": BLANK}
    config = known.config.to_dict() | {HIDDEN: usual} | dict(changes) | classes
    torch.manual_seed(seed)
    model = cls(cls.config_class.from_dict(config))
    convert(model, *stack_of(known))
    _take_over(model, known, folder)
    return Recogniser(model, extractor_in(folder), tokenizer_of(characters))


def _ctc_class(model_type: str) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES as CTC

    return getattr(transformers, CTC[model_type])


def _take_over(model: Any, known: Any, folder: Path) -> None:
    """Put the weights of `known`'s encoder into that of `model`."""
    prefix = model.base_model_prefix
    encoder = getattr(known, prefix, known)
    try:
        told = getattr(model, prefix).load_state_dict(encoder.state_dict(), strict=False)
    except RuntimeError:  # of another shape
        fits = False
    else:
        # Masks come and go with the chance of them, and so does what is put there.
        fits = all(name.endswith(UNUSED) for name in (*told.missing_keys, *told.unexpected_keys))
    if not fits:
        raise InputError(
            f"model.config doesn't fit the weights in {folder}; change only what has no weights, "
            "such as hidden_dropout or mask_time_prob."
        )
