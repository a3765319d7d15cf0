"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): `SD3Transformer2DModel`.

Image and text are two streams with their own weights that meet in one softmax, image tokens first.
SD3.5-Medium's first blocks have a second attention, `attn2`, of the image alone; the last block
computes no text output, so it has no `ff_context`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pared.anatomy.base import Block, Parts, block_of
from pared.anatomy.denoiser import Denoiser

PARTS: Parts = {
    "norm1": "modulation",
    "norm1_context": ("modulation", "text"),
    "attn": ("joint_attention", "both"),
    "attn2": "self_attention",
    "ff": "feed_forward",
    "ff_context": ("feed_forward", "text"),
}


class SD3(Denoiser):
    name = "sd3"
    classes = ("SD3Transformer2DModel",)
    conditions: tuple[str, ...] = ("text", "pooled")
    input_layer = "pos_embed.proj"
    feed_forward_norms: ClassVar[dict[str, str]] = {"ff": "norm2", "ff_context": "norm2_context"}
    timestep_embedder = "time_text_embed.timestep_embedder"
    embedder = "pos_embed"
    output_layer = "proj_out"

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            block_of(index, path, module, PARTS, ("text", "image"))
            for index, (path, module) in enumerate(self._list("transformer_blocks"))
        )

    def _denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        self._require_whole_patches(latents, self.config.patch_size)
        return model(
            hidden_states=latents,
            encoder_hidden_states=self._take(condition, "text"),
            pooled_projections=self._take(condition, "pooled"),
            timestep=timestep,
            return_dict=False,
        )[0]

    def encode(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        def some(prompts: list[str]) -> tuple[Tensor, ...]:
            text, _, pooled, _ = pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False
            )
            return text, pooled

        text, pooled = self._encoded(some, prompts)
        return {"text": text, "pooled": pooled}

    def example(self, batch=1, height=None, width=None, text_tokens=None, generator=None):
        latents = self._latents(batch, height, width, generator)
        # 77 tokens of CLIP and 256 of T5.
        length = 333 if text_tokens is None else text_tokens
        text = self._random(batch, length, self.config.joint_attention_dim, generator=generator)
        pooled = self._random(batch, self.config.pooled_projection_dim, generator=generator)
        timestep = torch.full((batch,), 500, device=latents.device)
        return latents, timestep, {"text": text, "pooled": pooled}
