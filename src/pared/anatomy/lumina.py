"""Lumina-Next (Zhuo et al., arXiv 2406.18583): `LuminaNextDiT2DModel`; text by cross-attention.

What sets it apart: its time runs from noise (0) to picture (1) and its prediction points that way,
which the stock pipeline turns round for its scheduler, and so does `denoise`. Self- and
cross-attention of a block hand on heads, which are added up and projected by `attn2.to_out`, so
that neither is a branch by itself. Queries have more heads than keys and values. Rotary positions
are complex numbers; scores of self-attention grow with the logarithm of the number of tokens.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.anatomy.base import Block, Branch, Parts, Role, Site, block_of
from pared.anatomy.denoiser import ENCODED_AT_ONCE, Denoiser
from pared.anatomy.heads import PROJECTIONS, HeadLayout, Heads, normalised, turned
from pared.nn.rotary import Rotary

PARTS: Parts = {
    "norm1": "modulation",
    "attn1": "self_attention",
    "attn2": "cross_attention",
    "feed_forward": "feed_forward",
}

# Pixels per token and side: 2 x 2 latent pixels of 8 x 8 pixels; fixed by the pipeline.
TOKEN = 16
# Pixels per latent pixel, likewise.
VAE_SCALE = 8


class LuminaHeads(HeadLayout):
    """Norms across all heads at once, complex rotations, heads as they are for an output."""

    ignores_mask = True

    def rotary(self, given: dict[str, Any]) -> Rotary:
        angles = given["query_rotary_emb"]  # a complex number for each pair of channels
        cos, sin = (part.repeat_interleave(2, dim=-1) for part in (angles.real, angles.imag))
        return Rotary(cos, sin)

    def heads(
        self, attn: Any, x: Tensor, rotary: Rotary | None = None, added: bool = False
    ) -> Heads:
        q, k, v = (getattr(attn, name)(x) for name in PROJECTIONS)
        channels = q.shape[-1] // attn.heads
        q, k = normalised(attn.norm_q, q).to(v.dtype), normalised(attn.norm_k, k).to(v.dtype)
        q, k, v = (part.unflatten(-1, (-1, channels)).transpose(1, 2) for part in (q, k, v))
        return Heads(turned(q, rotary), turned(k, rotary), v)

    def scale(self, attn: Any, tokens: int, given: dict[str, Any]) -> float:
        base = given.get("base_sequence_length")
        return attn.scale if base is None else math.sqrt(math.log(tokens, base)) * attn.scale

    def tokens(self, attn: Any, mixed: Tensor, added: bool = False) -> Tensor:
        return mixed.transpose(1, 2)


class Lumina(Denoiser):
    name = "lumina"
    classes = ("LuminaNextDiT2DModel",)
    conditions: tuple[str, ...] = ("text", "mask")
    input_layer = "patch_embedder.proj"
    feed_forward_norms: ClassVar[dict[str, str]] = {"feed_forward": "ffn_norm1"}
    timestep_embedder = "time_caption_embed.timestep_embedder"
    rising = True
    embedder = "patch_embedder"
    output_layer = "norm_out"
    layout = LuminaHeads()

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            block_of(index, path, module, PARTS)
            for index, (path, module) in enumerate(self._list("layers"))
        )

    @property
    def branches(self) -> tuple[Branch, ...]:
        found = []
        for block in self.blocks:
            # What is gated and added has been normalised once more.
            ends = {"norm2": "attn2.to_out.0", "ffn_norm2": "feed_forward"}
            for norm, feed in ends.items():
                module = block.module.get_submodule(norm)
                feeds = (f"{block.path}.{feed}",)
                found.append(Branch(f"{block.path}.{norm}", module, block.index, feeds))
        return tuple(found)

    def linear_layers(self, site: Site, role: Role) -> tuple[str, ...]:
        gated: dict[Role, tuple[str, ...]] = {"fc1": ("linear_1", "linear_3"), "fc2": ("linear_2",)}
        if site.kind == "feed_forward":
            return tuple(f"{site.path}.{name}" for name in gated.get(role, ()))
        return super().linear_layers(site, role)

    def some_tokens(self, embedded: Any, ids: Tensor) -> Any:
        tokens, mask, size, rotary = embedded
        # The mask is one of keys, which stay all tokens.
        return super().some_tokens(tokens, ids), mask, size, super().some_tokens(rotary, ids)

    def told(self, timestep: Tensor) -> Tensor:
        return 1 - timestep / 1000

    def _denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        patch, side = self.config.patch_size, self.config.sample_size
        self._require_whole_patches(latents, patch)
        height, width = latents.shape[-2:]
        rotary = get_2d_rotary_pos_embed_lumina(
            self.config.hidden_size // self.config.num_attention_heads,
            height // patch,
            width // patch,
            linear_factor=math.sqrt(height * width) / side,
        )
        velocity = model(
            hidden_states=latents,
            timestep=self.told(timestep),
            encoder_hidden_states=self._take(condition, "text"),
            encoder_mask=self._take(condition, "mask"),
            image_rotary_emb=rotary,
            cross_attention_kwargs={"base_sequence_length": (side * VAE_SCALE // TOKEN) ** 2},
            return_dict=False,
        )[0]
        return -velocity

    def encode(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            parts = [
                pipeline.encode_prompt(
                    prompts[start : start + ENCODED_AT_ONCE], do_classifier_free_guidance=False
                )[:2]
                for start in range(0, len(prompts), ENCODED_AT_ONCE)
            ]
        # The pipeline pads to the longest of the prompts that it gets at once.
        longest = max(mask.shape[1] for _, mask in parts)
        text = [F.pad(text, (0, 0, 0, longest - text.shape[1])) for text, _ in parts]
        mask = [F.pad(mask, (0, longest - mask.shape[1])) for _, mask in parts]
        return {"text": torch.cat(text).float().cpu(), "mask": torch.cat(mask).float().cpu()}

    def example(self, batch=1, height=None, width=None, text_tokens=None, generator=None):
        latents = self._latents(batch, height, width, generator)
        length = 256 if text_tokens is None else text_tokens
        text = self._random(batch, length, self.config.cross_attention_dim, generator=generator)
        timestep = torch.full((batch,), 500, device=latents.device)
        mask = torch.ones(text.shape[:2], device=latents.device)
        return latents, timestep, {"text": text, "mask": mask}
