"""Image-text contrastive training (CLIP: Radford et al. 2021, arXiv 2103.00020, section 2.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Contrastive(nn.Module):
    """The symmetric cross-entropy over the image-text similarities of a batch.

    Batch: `pixel_values` (batch, 3, height, width), `input_ids` and `attention_mask` (batch,
    tokens). Model: a transformers `CLIPModel`. Negatives are those of the process's own share of
    the batch.
    """

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        output = model(
            pixel_values=batch["pixel_values"],
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
        )
        logits = output.logits_per_image.float()
        target = torch.arange(len(logits), device=logits.device)
        return {
            "image": 0.5 * F.cross_entropy(logits, target),
            "text": 0.5 * F.cross_entropy(logits.T, target),
        }
