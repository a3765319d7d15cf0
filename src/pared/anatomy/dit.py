"""DiT (Peebles and Xie, arXiv 2212.09748): `DiTTransformer2DModel`; classes, no text.

Two habits of diffusers' class to know: it reassembles its patches into a square whatever came in,
so that other shapes come out scrambled (refused here); and in training mode it drops labels at
random, from torch's global generator.
"""

import torch
from torch import Tensor, nn

from pared.anatomy.base import Block, Family, Parts, block_of
from pared.errors import InputError

PARTS: Parts = {"norm1": "modulation", "attn1": "self_attention", "ff": "feed_forward"}


class DiT(Family):
    name = "dit"
    classes = ("DiTTransformer2DModel",)
    conditions: tuple[str, ...] = ("label",)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            block_of(index, path, module, PARTS)
            for index, (path, module) in enumerate(self._list("transformer_blocks"))
        )

    def denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        self._require_whole_patches(latents, self.config.patch_size)
        height, width = latents.shape[-2:]
        if height != width:
            raise InputError(
                f"latents of {height} x {width} don't work with DiTTransformer2DModel, which "
                "puts its patches back as a square; use a height equal to the width."
            )
        output = model(
            latents,
            timestep=timestep,
            class_labels=self._take(condition, "label"),
            return_dict=False,
        )[0]
        # The published weights also predict a variance, in the second half of the channels.
        return output[:, : latents.shape[1]]

    def example(self, batch=1, height=None, width=None, text_tokens=None, generator=None):
        latents = self._latents(batch, height, width, generator)
        timestep = torch.full((batch,), 500, device=latents.device)
        label = torch.randint(self.config.num_embeds_ada_norm, (batch,), generator=generator)
        return latents, timestep, {"label": label.to(latents.device)}
