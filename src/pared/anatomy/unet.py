"""The U-Nets of Stable Diffusion 1, 2 and XL: `UNet2DConditionModel`.

A block, here, is one transformer block; several of them form a `Transformer2DModel`, which turns a
feature map into tokens, so every site has the grid of its own resolution level.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pared.anatomy.base import Block, Family, Grid, Parts, Site, SiteKind, block_of
from pared.errors import InputError
from pared.nn.diffusion import guidance_features

# Pixels per latent pixel of the autoencoders that these models were trained with.
VAE_SCALE = 8


class UNet(Family):
    name = "unet"
    classes = ("UNet2DConditionModel",)
    conditions: tuple[str, ...] = ("text",)
    input_layer = "conv_in"
    feed_forward_norms: ClassVar[dict[str, str]] = {"ff": "norm3"}
    timestep_embedder = "time_embedding"
    guidance_projection = "time_embedding.cond_proj"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        added = self.config.addition_embed_type
        if added == "text_time":
            self.conditions = ("text", "pooled", "time_ids")
        elif added is not None:
            raise InputError(
                f"pared reads the U-Nets of Stable Diffusion 1, 2 and XL; this one is "
                f"conditioned by {added!r}."
            )
        if self.config.time_cond_proj_dim is not None:
            self.input("guidance_weight")

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            block_of(index, path, module, _parts(module))
            for index, (path, module) in enumerate(self._transformer_blocks())
        )

    def _transformer_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        middle = ("mid_block", self.model.mid_block)
        for stage, module in (*self._list("down_blocks"), middle, *self._list("up_blocks")):
            # Stages without attention have no such list, and a U-Net may have no middle.
            for number, part in enumerate(getattr(module, "attentions", ())):
                if hasattr(part, "transformer_blocks"):
                    yield from self._list(f"{stage}.attentions.{number}.transformer_blocks")

    def _grid_source(self, site: Site) -> tuple[nn.Module, Grid]:
        path, _, _ = site.path.rpartition(".transformer_blocks.")
        return self.model.get_submodule(path), Grid()

    def _denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """See `Family.denoise`. For SDXL, `time_ids` (batch, 6) are original height and width, top
        and left of the crop, target height and width, in pixels; if absent, the latents' own size.
        `guidance_weight` (batch,) is for models that have an input for it; 0 if absent.
        """
        added = None
        if "pooled" in self.conditions:
            time_ids = condition.get("time_ids")
            added = {
                "text_embeds": self._take(condition, "pooled"),
                "time_ids": size_ids(latents) if time_ids is None else time_ids,
            }
        features = None
        if (channels := self.config.time_cond_proj_dim) is not None:
            # As the stock pipelines do, whose guidance_scale is 1 + guidance_weight.
            weight = self.input("guidance_weight").numbers(latents)
            features = guidance_features(weight, channels).to(latents.dtype)
        return model(
            latents,
            timestep,
            timestep_cond=features,
            encoder_hidden_states=self._take(condition, "text"),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def add_guidance_projection(self, channels: int) -> None:
        embedding: Any = self.model.time_embedding
        if embedding.cond_proj is None:
            weight = embedding.linear_1.weight
            embedding.cond_proj = nn.Linear(channels, weight.shape[1], bias=False).to(weight)
            nn.init.zeros_(embedding.cond_proj.weight)
            cast(Any, self.model).register_to_config(time_cond_proj_dim=channels)

    def encode(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        def some(prompts: list[str]) -> tuple[Tensor, ...]:
            if "pooled" not in self.conditions:
                return pipeline.encode_prompt(prompts, pipeline.device, 1, False)[:1]
            text, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
            return text, pooled

        return dict(zip(("text", "pooled"), self._encoded(some, prompts), strict=False))

    def example(self, batch=1, height=None, width=None, text_tokens=None, generator=None):
        latents = self._latents(batch, height, width, generator)
        length = 77 if text_tokens is None else text_tokens
        text = self._random(batch, length, self.config.cross_attention_dim, generator=generator)
        condition = {"text": text}
        if "pooled" in self.conditions:
            ids = size_ids(latents)
            sizes = ids.shape[1] * self.config.addition_time_embed_dim
            pooled = self.config.projection_class_embeddings_input_dim - sizes
            condition["pooled"] = self._random(batch, pooled, generator=generator)
            condition["time_ids"] = ids
        return latents, torch.full((batch,), 500, device=latents.device), condition


def size_ids(latents: Tensor) -> Tensor:
    """SDXL's size condition (batch, 6) for images of just this size, uncropped."""
    height, width = (VAE_SCALE * side for side in latents.shape[-2:])
    # In float32, since half precision rounds sizes above 2048.
    ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
    return ids.to(latents.device).expand(len(latents), -1)


def _parts(block: Any) -> Parts:
    # In some upscalers the first attention of a block reads the text too.
    first: SiteKind = "cross_attention" if block.only_cross_attention else "self_attention"
    return {"attn1": first, "attn2": "cross_attention", "ff": "feed_forward"}
