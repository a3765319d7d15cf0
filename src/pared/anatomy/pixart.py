"""PixArt-alpha, -Sigma: `PixArtTransformer2DModel`; text by cross-attention, shared modulation."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pared.anatomy.base import Block, Parts, block_of
from pared.anatomy.denoiser import Denoiser

PARTS: Parts = {"attn1": "self_attention", "attn2": "cross_attention", "ff": "feed_forward"}


class PixArt(Denoiser):
    name = "pixart"
    classes = ("PixArtTransformer2DModel",)
    conditions: tuple[str, ...] = ("text", "mask")
    input_layer = "pos_embed.proj"
    feed_forward_norms: ClassVar[dict[str, str]] = {"ff": "norm2"}
    timestep_embedder = "adaln_single.emb.timestep_embedder"
    embedder = "pos_embed"
    output_layer = "proj_out"
    # What the biases of a block's own modulation are elsewhere.
    shifts: ClassVar[tuple[str, ...]] = ("bias", "scale_shift_table")

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            block_of(index, path, module, PARTS)
            for index, (path, module) in enumerate(self._list("transformer_blocks"))
        )

    def _denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        self._require_whole_patches(latents, self.config.patch_size)
        return model(
            latents,
            encoder_hidden_states=self._take(condition, "text"),
            encoder_attention_mask=self._take(condition, "mask"),
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]

    def encode(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        # Padding is masked out, so that a shorter one changes nothing.
        longest = max(map(len, pipeline.tokenizer(prompts).input_ids))

        def some(prompts: list[str]) -> tuple[Tensor, ...]:
            return pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, max_sequence_length=longest
            )[:2]

        text, mask = self._encoded(some, prompts)
        return {"text": text, "mask": mask}

    def example(self, batch=1, height=None, width=None, text_tokens=None, generator=None):
        latents = self._latents(batch, height, width, generator)
        text = self._random(
            batch,
            300 if text_tokens is None else text_tokens,
            self.config.caption_channels,
            generator=generator,
        )
        timestep = torch.full((batch,), 500, device=latents.device)
        mask = torch.ones(text.shape[:2], device=latents.device)
        return latents, timestep, {"text": text, "mask": mask}
