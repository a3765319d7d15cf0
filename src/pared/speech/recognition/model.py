"""A recogniser: a CTC model of transformers, what makes its inputs, and what names its classes."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from pared import checkpoint
from pared.errors import InputError
from pared.nn.modes import in_eval_mode
from pared.objectives.ctc import frame_lengths
from pared.speech.encoders import inputs_of, save

# The share of a second that any model makes a frame of; shorter sounds are padded.
SHORTEST = 0.2
# A weight that only training uses; published models often lack it.
UNUSED = "masked_spec_embed"
# How a piece of a word tells that it begins one, where words aren't delimited.
WORD_BEGINS = "\u2581"


@dataclass(frozen=True)
class Recogniser:
    """What it takes to get from a sound to scores of labels.

    Attributes:
        model: a transformers `...ForCTC`.
        extractor: the feature extractor that goes with it.
        tokenizer: the tokenizer that goes with it.
    """

    model: Any
    extractor: Any
    tokenizer: Any

    @property
    def rate(self) -> int:
        """Samples per second that the model was trained at."""
        return int(self.extractor.sampling_rate)

    @property
    def blank(self) -> int:
        """The class of CTC's blank."""
        return int(self.model.config.pad_token_id)

    @cached_property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        config = self.model.config
        if self.model.main_input_name == "input_values":
            # transformers leaves out the convolutions of an adapter, behind the encoder.
            adapter = getattr(config, "add_adapter", False)
            fewer = config.adapter_stride**config.num_adapter_layers if adapter else 1
            return int(config.inputs_to_logits_ratio) * int(fewer)
        # Features come every 10 ms; how many of them make a frame, two lengths tell.
        sounds = [torch.zeros(seconds * self.rate) for seconds in (8, 40)]
        short, long = frame_lengths(self.model, self.inputs(sounds)["input_lengths"]).tolist()
        step = self.rate // 100
        return round(32 * self.rate / (long - short) / step) * step

    def inputs(self, sounds: list[Tensor]) -> dict[str, Tensor]:
        """What the model reads of sounds, float (samples,) each at `rate`; see `CTC`."""
        batch = inputs_of(self.extractor, sounds, self.model.main_input_name)
        if not self.extractor.return_attention_mask:
            # Models with a group norm were trained without.
            del batch["attention_mask"]
        return batch

    @torch.no_grad()  # not inference_mode, whose tensors no training takes: models keep tables
    def scores(self, sound: Tensor) -> Tensor:
        """Logarithmic probabilities of all classes in all frames, (frames, classes), on the CPU.

        They are those of eval mode. Frames that the model itself counts as padding are left out.

        Args:
            sound: float (samples,) at `rate`.
        """
        missing = round(SHORTEST * self.rate) - len(sound)
        batch = self.inputs([F.pad(sound, (0, max(0, missing)))])
        lengths = batch.pop("input_lengths")
        weights = next(self.model.parameters())
        given = {
            name: value.to(weights.device, weights.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }
        with in_eval_mode(self.model):
            logits: Tensor = self.model(**given).logits[0]
        if "attention_mask" in given:
            logits = logits[: int(frame_lengths(self.model, lengths))]
        return logits.float().log_softmax(dim=-1).cpu()

    def save(self, folder: str | Path) -> None:
        """Write an ordinary transformers folder; a converted model gets its `pared.json`."""
        save(self.model, folder, self.extractor, self.tokenizer)


def load(folder: str | Path, device: str | torch.device = "cpu") -> Recogniser:
    """A saved CTC model with its feature extractor and tokenizer, in eval mode.

    Args:
        folder: of transformers, or of pared where the model was converted.
        device: where to put the weights.

    Raises:
        InputError: there is none, it's no CTC model, or a part is missing or damaged or needs
            another package.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    check_folder(folder)
    extractor, tokenizer = extractor_in(folder), _part(AutoTokenizer, folder)
    _check_words(folder, tokenizer)
    return Recogniser(_model(folder).to(device).eval(), extractor, tokenizer)


def extractor_in(folder: Path) -> Any:
    """The feature extractor that was saved with a model.

    Raises:
        InputError: there is none, or it needs another package.
    """
    from transformers import AutoFeatureExtractor

    return _part(AutoFeatureExtractor, folder)


def _part(cls: Any, folder: Path) -> Any:
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError):
        raise InputError(
            f"{folder} lacks the feature extractor or the tokenizer of its model; copy the whole "
            "folder."
        ) from None
    except ImportError as error:
        reason = _first_line(error).partition(". ")[0]  # what follows tells what to restart
        raise InputError(
            f"{folder} needs a package that isn't here ({reason}); install it, or give another "
            "model."
        ) from None


def check_folder(folder: Path, wanted: str = "a saved CTC model") -> None:
    """Refuse what is no CTC model, before any library is loaded for it.

    Args:
        folder: to look into.
        wanted: what else would be right, for messages.

    Raises:
        InputError: there is no such folder, or something else in it.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}; give {wanted}.")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no model ({_first_line(error)}); give {wanted}.") from None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES as CTC

    if config.get("model_type") not in CTC:
        kind = config.get("model_type") or config.get("_class_name")
        raise InputError(
            f"{folder} holds a {kind}, which is no CTC model; there are {', '.join(CTC)}."
        )


def _model(folder: Path) -> Any:
    """The model with all its weights; `from_pretrained` would fill missing ones at random."""
    from transformers import AutoModelForCTC

    if (folder / checkpoint.SIDECAR).exists():
        return checkpoint.load(folder)
    try:
        model, told = AutoModelForCTC.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder} can't be opened as a CTC model: {_first_line(error)}."
        ) from None
    lost = sorted(name for name in told["missing_keys"] if not name.endswith(UNUSED))
    if lost:
        raise InputError(
            f"{folder} lacks the weight {lost[0]!r}; give a model that was trained with CTC, whole."
        )
    return model


def _check_words(folder: Path, tokenizer: Any) -> None:
    delimited = getattr(tokenizer, "word_delimiter_token", None)
    if not delimited and not any(name.startswith(WORD_BEGINS) for name in tokenizer.get_vocab()):
        raise InputError(
            f"the tokenizer in {folder} tells words apart neither by a delimiter nor by "
            f"{WORD_BEGINS!r}; give a model whose tokenizer does."
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
