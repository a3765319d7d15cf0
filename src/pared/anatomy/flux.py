"""FLUX.1: `FluxTransformer2DModel`; two-stream blocks, then one-stream blocks, text tokens first.

The model gets a flat sequence: the pipeline packs 2 x 2 latent pixels into one token, and each
token's row and column come in `img_ids`, for the rotary positions. `denoise` does the pipeline's
part, and the grid is read from the ids. A one-stream block computes attention and feed-forward side
by side, between shared layers; its feed-forward is no module of its own and hence no site.
"""

from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.anatomy.base import Block, Branch, Parts, Role, Site, block_of
from pared.anatomy.denoiser import Denoiser, Grid, OfCall
from pared.errors import InputError

# Latent pixels per token and side; fixed by the pipeline, in no configuration.
PACK = 2

# Side of the latents, of 1024 pixels; likewise.
SAMPLE_SIZE = 128

PARTS: Parts = {
    "norm1": "modulation",
    "norm1_context": ("modulation", "text"),
    "attn": ("joint_attention", "both"),
    "ff": "feed_forward",
    "ff_context": ("feed_forward", "text"),
}
SINGLE_PARTS: Parts = {"norm": ("modulation", "both"), "attn": ("joint_attention", "both")}


class PackedGrid(Grid):
    """The grid of a flat sequence of image tokens, from their positions in `img_ids` (tokens, 3).

    Reading values out of a tensor breaks a compiled graph: `torch.compile(fullgraph=True)` works on
    the blocks of a model that carries such a grid, not on the model as a whole.
    """

    image_first = False
    _ids = OfCall()

    def __init__(self) -> None:
        super().__init__(PACK)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        try:
            super().__call__(module, args, kwargs)
        except InputError as error:
            # For whoever reads the grid. Nobody may: methods that were taken off leave it behind.
            self.height = self.width = error
            self._ids = None

    def measure(self, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        ids = kwargs["img_ids"] if "img_ids" in kwargs else args[4]
        # A pipeline passes the same tensor at every step: a GPU is made to wait for it only once.
        if ids is self._ids:
            return self.height, self.width
        size = _size_of(ids)
        self._ids = ids
        return size


def _size_of(ids: Tensor) -> tuple[int, int]:
    rows = ids[0] if ids.ndim == 3 else ids
    # The first row's length is counted, since half precision rounds the numbers of far rows.
    same_image, first_row = rows[:, 0] == rows[0, 0], rows[:, 1] == rows[0, 1]
    own, width = torch.stack([same_image.sum(), first_row.sum()]).tolist()
    if own != len(rows) or len(rows) % width:
        raise InputError(
            f"the {len(rows)} image tokens of this call don't form one grid (reference images are "
            "in the sequence); methods that need the grid work on plain FLUX.1 calls only."
        )
    return len(rows) // width, width


class Flux(Denoiser):
    name = "flux"
    classes = ("FluxTransformer2DModel",)
    conditions: tuple[str, ...] = ("text", "pooled")
    input_layer = "x_embedder"
    feed_forward_norms: ClassVar[dict[str, str]] = {"ff": "norm2", "ff_context": "norm2_context"}
    timestep_embedder = "time_text_embed.timestep_embedder"
    embedder = "x_embedder"
    output_layer = "proj_out"
    compiles_whole = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if self.config.guidance_embeds:
            self.conditions = ("text", "pooled", "guidance")

    @property
    def channels(self) -> int:
        return self.config.in_channels // PACK**2

    @property
    def patch(self) -> int:
        return PACK

    @property
    def sample_size(self) -> int:
        return SAMPLE_SIZE

    @property
    def blocks(self) -> tuple[Block, ...]:
        double = [(p, m, PARTS) for p, m in self._list("transformer_blocks")]
        single = [(p, m, SINGLE_PARTS) for p, m in self._list("single_transformer_blocks")]
        return tuple(
            block_of(index, *block, ("text", "image"))
            for index, block in enumerate(double + single)
        )

    @property
    def branches(self) -> tuple[Branch, ...]:
        found = []
        for block in self.blocks:
            if block.path.startswith("transformer_blocks."):
                kinds = ("joint_attention", "feed_forward")
                found += [Branch(s.path, s.module, s.block) for s in block.sites if s.kind in kinds]
            else:
                feeds = (f"{block.path}.attn", f"{block.path}.proj_mlp")
                out = cast(Any, block.module).proj_out
                found.append(Branch(f"{block.path}.proj_out", out, block.index, feeds))
        return tuple(found)

    def _grid_source(self, site: Site) -> tuple[nn.Module, Grid]:
        return self.model, PackedGrid()

    def patches(self, latents: Tensor) -> Tensor:
        return latents.unflatten(2, (-1, PACK**2))

    def linear_layers(self, site: Site, role: Role) -> tuple[str, ...]:
        # A one-stream block projects attention and feed-forward out together.
        if role == "out" and site.path.startswith("single_transformer_blocks."):
            return (
                (f"{site.path.rpartition('.')[0]}.proj_out",) if site.kind != "modulation" else ()
            )
        return super().linear_layers(site, role)

    def told(self, timestep: Tensor) -> Tensor:
        return timestep / 1000

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        if scheduler.config.get("use_flow_sigmas"):
            super().set_timesteps(scheduler, steps, size)
        else:  # the pipeline has noise levels of its own
            sigmas = np.linspace(1, 1 / steps, steps)
            scheduler.set_timesteps(sigmas=sigmas, **self._schedule(scheduler, size))

    def _denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """See `denoise`. `guidance` (batch,) is a scale; 3.5, the pipeline's, if absent."""
        self._require_whole_patches(latents, PACK)
        height, width = latents.shape[-2] // PACK, latents.shape[-1] // PACK
        text = self._take(condition, "text")
        guidance = None
        if "guidance" in self.conditions:
            guidance = condition.get("guidance")
            if guidance is None:
                guidance = torch.full_like(timestep, 3.5, dtype=torch.float32)
        # On the meta device the ids stay real: a grid can't be read from tensors without values.
        device = "cpu" if latents.device.type == "meta" else latents.device
        output = model(
            hidden_states=pack(latents),
            encoder_hidden_states=text,
            pooled_projections=self._take(condition, "pooled"),
            timestep=self.told(timestep),
            img_ids=image_ids(height, width).to(device),
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    def encode(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        text, pooled = self._encoded(lambda some: pipeline.encode_prompt(some, None)[:2], prompts)
        return {"text": text, "pooled": pooled}

    def example(self, batch=1, height=None, width=None, text_tokens=None, generator=None):
        latents = self._latents(batch, height, width, generator)
        length = 512 if text_tokens is None else text_tokens
        text = self._random(batch, length, self.config.joint_attention_dim, generator=generator)
        pooled = self._random(batch, self.config.pooled_projection_dim, generator=generator)
        condition = {"text": text, "pooled": pooled}
        if "guidance" in self.conditions:
            condition["guidance"] = torch.full((batch,), 3.5, device=latents.device)
        return latents, torch.full((batch,), 500, device=latents.device), condition


def pack(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) to (batch, height/2 x width/2, channels x 4)."""
    return F.pixel_unshuffle(latents, PACK).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(batch, height x width, channels x 4) to (batch, channels, 2 height, 2 width)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), PACK)


def image_ids(height: int, width: int) -> Tensor:
    """Position of every image token, (height x width, 3): image number (0), row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
