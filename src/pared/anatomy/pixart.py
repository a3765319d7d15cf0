"""PixArt-alpha, -Sigma: `PixArtTransformer2DModel`; text by cross-attention, shared modulation."""

import inspect
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pared.anatomy.base import Block, Parts, block_of
from pared.anatomy.denoiser import Denoiser

# Pixels per latent pixel of the autoencoders that these models were trained with.
VAE_SCALE = 8

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
            added_cond_kwargs=self._size_of(latents),
            return_dict=False,
        )[0]

    def _size_of(self, latents: Tensor) -> dict[str, Tensor | None]:
        """Height and width in pixels (batch, 2) and their ratio (batch, 1), where they're read."""
        if not cast(Any, self.model).use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = latents.shape[-2:]
        size = latents.new_tensor([VAE_SCALE * height, VAE_SCALE * width])
        ratio = latents.new_tensor([height / width])
        return {
            "resolution": size.expand(len(latents), -1),
            "aspect_ratio": ratio.expand(len(latents), -1),
        }

    def encode(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        # Padding is masked out, so that a shorter one changes nothing. The pipeline puts prompts in
        # lower case, which may take more tokens.
        ids = pipeline.tokenizer(pipeline._text_preprocessing(prompts)).input_ids
        most = inspect.signature(pipeline.encode_prompt).parameters["max_sequence_length"].default
        longest = min(most, max(map(len, ids)))

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
