"""The judge: an encoder of pictures and texts, with no part in making them, that compares them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pared.errors import InputError
from pared.worlds import house

HOUSE = "house:judge"
BATCH = 64


@dataclass(frozen=True)
class Judge:
    """A CLIP model and its tokenizer, as a measure.

    Features are of unit length: the model was trained on cosines, lengths mean nothing in it.

    Attributes:
        model: a transformers `CLIPModel`, in evaluation mode.
        tokenizer: its tokenizer.
        name: what it is called in reports.
        mean: of its pixels, by channel, in [0, 1].
        std: likewise.
        digest: of its weights; figures of different judges are not comparable.
    """

    model: Any
    tokenizer: Any
    name: str
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    digest: str = ""

    @property
    def dimensions(self) -> int:
        """Length of a feature."""
        return self.model.config.projection_dim

    @torch.no_grad()
    def of_images(self, images: torch.Tensor) -> torch.Tensor:
        """Features (n, dimensions) of pictures (n, 3, height, width) in [0, 1]."""
        side = self.model.config.vision_config.image_size
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        features = []
        for batch in images.float().cpu().split(BATCH):
            if batch.shape[-2:] != (side, side):
                batch = F.interpolate(batch, (side, side), mode="bicubic", antialias=True)
            pixels = (batch.clamp(0, 1) - mean) / std
            output = self.model.get_image_features(pixel_values=pixels.to(self.model.device))
            features.append(_unit(output))
        return torch.cat(features)

    @torch.no_grad()
    def of_texts(self, texts: list[str]) -> torch.Tensor:
        """Features (n, dimensions) of texts."""
        features = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"
            ).to(self.model.device)
            output = self.model.get_text_features(tokens.input_ids, tokens.attention_mask)
            features.append(_unit(output))
        return torch.cat(features)


def _unit(output: Any) -> torch.Tensor:
    # Older versions of transformers return the features bare.
    features = output if torch.is_tensor(output) else output.pooler_output
    return F.normalize(features.float().cpu(), dim=-1)


def judge_of(given: Any) -> Judge | None:
    """The judge behind what the user gave.

    Args:
        given: a `Judge`; a (CLIPModel, tokenizer) pair; a folder, hub id or `house:judge`; or None
            for the house's own, where it is shipped.

    Returns:
        The judge, or None when none was named and none is shipped.

    Raises:
        InputError: there is no CLIP model at that place.
    """
    if given is None:
        return judge_of(HOUSE) if HOUSE.removeprefix("house:") in house.names() else None
    if isinstance(given, Judge):
        return given
    if isinstance(given, (str, Path)):
        return _from_folder(str(given))
    try:
        model, tokenizer = given
    except (TypeError, ValueError):
        raise InputError(
            f"the judge is a {type(given).__name__}; give a folder with a CLIP model and its "
            "tokenizer, or the two as a pair."
        ) from None
    name = type(model).__name__
    return Judge(model.eval(), tokenizer, name, digest=weight_digest(model))


def _from_folder(name: str) -> Judge:
    from transformers import CLIPModel, CLIPTokenizer

    folder = house.folder_of(name)
    try:
        model = CLIPModel.from_pretrained(folder).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"the judge {name!r} can't be opened as a CLIP model: {reason}.") from None
    statistics = {}
    if (path := Path(folder) / "preprocessor_config.json").exists():
        table = json.loads(path.read_text())
        statistics = {"mean": tuple(table["image_mean"]), "std": tuple(table["image_std"])}
    return Judge(model, tokenizer, name, digest=weight_digest(model), **statistics)


def weight_digest(model: nn.Module) -> str:
    """A short name for a model's weights: the same only if every number is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
