"""Wan 2.1 and 2.2 (arXiv 2503.20314): `WanTransformer3DModel`; video, text by cross-attention.

Latents are (batch, channels, frames, height, width). A token is a patch of one or more latent
frames (1 x 2 x 2 in the published models); all tokens of a video are one sequence, frame after
frame and row after row, and each attends to all. Queries and keys are normalised across all heads
at once and rotated by their position in time, row and column, so replacements made for attentions
of a picture don't fit. Models that start from a picture read its latents as further channels, and
some its features ("image") beside the prompt.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pared.anatomy.base import Block, Parts, Site, block_of
from pared.anatomy.denoiser import Denoiser, Grid, OfCall
from pared.errors import InputError

PARTS: Parts = {"attn1": "self_attention", "attn2": "cross_attention", "ffn": "feed_forward"}

# Latents of the pipeline's default, 81 frames of 480 x 832 pixels; the configuration knows no size.
FRAMES, HEIGHT, WIDTH = 21, 60, 104
# Features of a picture that the published models read: CLIP's patches and its class token.
IMAGE_TOKENS = 257


class VideoGrid(Grid):
    """The grid of a video: `frames` times `height` x `width` tokens, frame after frame.

    Args:
        patch: frames, height and width of a token, in latent pixels.

    Attributes:
        frames: number of frames, in tokens.
    """

    frames = OfCall()

    def __init__(self, patch: tuple[int, int, int]) -> None:
        super().__init__(patch[-1])
        self.frame_patch = patch[0]
        self._last["frames"] = 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__call__(module, args, kwargs)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.frames = hidden.shape[2] // self.frame_patch

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


class Wan(Denoiser):
    name = "wan"
    classes = ("WanTransformer3DModel",)
    conditions: tuple[str, ...] = ("text",)
    input_layer = "patch_embedding"
    feed_forward_norms: ClassVar[dict[str, str]] = {"ffn": "norm3"}
    sizes: ClassVar[tuple[dict[str, int], dict[str, int]]] = (
        {"height": 8, "width": 8, "frames": 3, "text_tokens": 8},
        {"height": 8, "width": 12, "frames": 2, "text_tokens": 8},
    )
    timestep_embedder = "condition_embedder.time_embedder"
    # What the biases of a block's own modulation are elsewhere.
    shifts: ClassVar[tuple[str, ...]] = ("bias", "scale_shift_table")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if self.config.image_dim is not None:
            self.conditions = ("text", "image")

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            block_of(index, path, module, PARTS)
            for index, (path, module) in enumerate(self._list("blocks"))
        )

    @property
    def patch(self) -> int:
        return self.config.patch_size[-1]

    def _grid_source(self, site: Site) -> tuple[nn.Module, Grid]:
        return self.model, VideoGrid(self.config.patch_size)

    def _denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """See `denoise`; here latents are (batch, channels, frames, height, width)."""
        frames, _, patch = self.config.patch_size
        self._require_whole_patches(latents, patch)
        if latents.shape[2] % frames:
            raise InputError(
                f"{latents.shape[2]} latent frames don't divide into the {self.name} model's "
                f"patches of {frames}; give a multiple of {frames}."
            )
        image = self._take(condition, "image") if "image" in self.conditions else None
        return model(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=self._take(condition, "text"),
            encoder_hidden_states_image=image,
            return_dict=False,
        )[0]

    def encode(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """See `Denoiser.encode`. Padding is attended to, so its length is the pipeline's own."""

        def some(prompts: list[str]) -> tuple[Tensor, ...]:
            return pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, max_sequence_length=512
            )[:1]

        return {"text": self._encoded(some, prompts)[0]}

    def example(
        self,
        batch: int = 1,
        height: int | None = None,
        width: int | None = None,
        text_tokens: int | None = None,
        generator: torch.Generator | None = None,
        frames: int | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Denoiser.example`.

        Args:
            batch: samples.
            height: of the latents; by default those of 480 pixels.
            width: likewise; by default those of 832 pixels.
            text_tokens: length of the prompt; by default the pipeline's 512, which a model that
                reads a picture's features can't do without.
            generator: source of the random numbers (CPU).
            frames: of the latents; by default those of 81 frames.
        """
        size = (frames or FRAMES, height or HEIGHT, width or WIDTH)
        latents = self._random(batch, self.channels, *size, generator=generator)
        length = 512 if text_tokens is None else text_tokens
        condition = {"text": self._random(batch, length, self.config.text_dim, generator=generator)}
        if "image" in self.conditions:
            condition["image"] = self._random(
                batch, IMAGE_TOKENS, self.config.image_dim, generator=generator
            )
        return latents, torch.full((batch,), 500, device=latents.device), condition
