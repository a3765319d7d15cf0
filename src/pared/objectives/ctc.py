"""Training recognisers: connectionist temporal classification (Graves et al. 2006, ICML).

A recogniser scores every label, and a blank, in every frame. A path through the frames says what
its labels say once repetitions are taken together and then blanks left out; the probability of a
transcript is that of all its paths. Two equal labels in a row need a blank between them, so a
transcript takes as many frames at least as it has labels and such pairs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.anatomy import unwrap
from pared.errors import InputError

# What transformers' classes call the number of frames that they make of an input's length.
LENGTHS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")


class CTC(nn.Module):
    """-log p(transcript) per label.

    Batch: `input_values` (batch, samples) or `input_features` (batch, frames, bins), whichever the
    model reads, padded at the end; `input_lengths` (batch,) without the padding; `attention_mask`,
    1 where there is none, for models that take it; `labels` (batch, most), padded with anything;
    `label_lengths` (batch,). Model: a transformers `...ForCTC`, whose `pad_token_id` is the blank.
    """

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        inner: Any = unwrap(model)
        name = inner.main_input_name
        logits = model(**{name: batch[name]}, attention_mask=batch.get("attention_mask")).logits
        frames = frame_lengths(inner, batch["input_lengths"]).clamp(max=logits.shape[1])
        blank = inner.config.pad_token_id
        loss = ctc_loss(logits, frames, batch["labels"], batch["label_lengths"], blank)
        return {"ctc": loss}


def ctc_loss(
    logits: Tensor, frames: Tensor, labels: Tensor, label_lengths: Tensor, blank: int = 0
) -> Tensor:
    """-log p(transcripts) over the number of labels of a batch.

    Args:
        logits: (batch, frames, classes), in any floating-point type; computed in float32.
        frames: of each sample, without padding, (batch,).
        labels: (batch, most).
        label_lengths: of each sample, without padding, (batch,).
        blank: the class of the blank.

    Returns:
        A number. A transcript without any path counts as 0 and pulls at nothing.
    """
    scores = logits.float().log_softmax(dim=-1).transpose(0, 1)
    total = F.ctc_loss(
        scores, labels, frames, label_lengths, blank, reduction="sum", zero_infinity=True
    )
    return total / label_lengths.sum()


def frame_lengths(model: nn.Module, lengths: Tensor) -> Tensor:
    """Frames that a model makes of inputs of these lengths, int64 (batch,).

    Args:
        model: a transformers model that scores frames of sound.
        lengths: samples or frames of features, whichever it reads, (batch,).

    Raises:
        InputError: it doesn't tell.
    """
    for name in LENGTHS:
        if hasattr(model, name):
            frames: Tensor = getattr(model, name)(lengths)
            return frames.to(torch.int64)
    raise InputError(
        f"{type(model).__name__} doesn't tell how many frames it makes of a sound; give a CTC "
        "model such as Wav2Vec2ForCTC."
    )


def frames_needed(labels: Tensor) -> int:
    """The fewest frames in which labels (count,) can be said: one each, and one between equals."""
    return len(labels) + int((labels[1:] == labels[:-1]).sum())
