"""DiT (Peebles and Xie, arXiv 2212.09748): `DiTTransformer2DModel`; classes, no text.

Two habits of diffusers' class to know: it reassembles its patches into a square whatever came in,
so that other shapes come out scrambled (refused here); and in training mode every block drops
labels at random by itself, so that of DiT-XL's 28 hardly ever all get the same one (kept from it
here: dropping conditions is for the data). And one of its pipeline: it guides by class 1000,
however many classes there are. The tables of `set_classes` take that for their null class where
they have fewer; where they have more it is an ordinary class, and `stock_null` says so.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pared.anatomy.base import Block, Parts, block_of
from pared.anatomy.denoiser import Denoiser
from pared.errors import InputError

# The class that the stock pipeline takes for none at all: the one behind ImageNet's thousand.
STOCK_NULL = 1000

PARTS: Parts = {"norm1": "modulation", "attn1": "self_attention", "ff": "feed_forward"}


class DiT(Denoiser):
    name = "dit"
    classes = ("DiTTransformer2DModel",)
    conditions: tuple[str, ...] = ("label",)
    input_layer = "pos_embed.proj"
    feed_forward_norms: ClassVar[dict[str, str]] = {"ff": "norm3"}
    # Its pictures are squares.
    sizes: ClassVar[tuple[dict[str, int], dict[str, int]]] = (
        {"height": 8, "width": 8},
        {"height": 12, "width": 12},
    )
    timestep_embedder = "transformer_blocks.*.norm1.emb.timestep_embedder"
    embedder = "pos_embed"
    output_layer = "proj_out_2"

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            block_of(index, path, module, PARTS)
            for index, (path, module) in enumerate(self._list("transformer_blocks"))
        )

    @property
    def label_tables(self) -> tuple[str, ...]:
        # Each block has one of its own, where the published code has one in all.
        return tuple(f"{b.path}.norm1.emb.class_embedder.embedding_table" for b in self.blocks)

    def set_classes(self, count: int) -> None:
        tables = [self.model.get_submodule(path) for path in self.label_tables]
        weights = [cast(Tensor, table.weight) for table in tables]
        if count != self.config.num_embeds_ada_norm:
            # One draw for all blocks, with the spread of the published code.
            rows = 0.02 * torch.randn_like(weights[0][:1].expand(count, -1))
            weights = [torch.cat([rows, weight[-1:].detach()]) for weight in weights]
            cast(Any, self.model).register_to_config(num_embeds_ada_norm=count)
        elif count >= STOCK_NULL:
            return
        kind = Labels if count < STOCK_NULL else nn.Embedding
        for path, weight in zip(self.label_tables, weights, strict=True):
            self.replace(path, kind.from_pretrained(weight, freeze=False))
            cast(Any, self.model.get_submodule(path.rpartition(".")[0])).num_classes = count

    @property
    def stock_null(self) -> bool:
        """Whether the stock pipeline finds the null class, by which it guides."""
        table = self.model.get_submodule(self.label_tables[0])
        return isinstance(table, Labels) or self.config.num_embeds_ada_norm == STOCK_NULL

    def _denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        self._require_whole_patches(latents, self.config.patch_size)
        height, width = latents.shape[-2:]
        if height != width:
            raise InputError(
                f"latents of {height} x {width} don't work with DiTTransformer2DModel, which "
                "puts its patches back as a square; use a height equal to the width."
            )
        for path in self.label_tables:
            self.model.get_submodule(path.rpartition(".")[0]).eval()
        return model(
            latents,
            timestep=timestep,
            class_labels=self._take(condition, "label"),
            return_dict=False,
        )[0]

    def example(self, batch=1, height=None, width=None, text_tokens=None, generator=None):
        latents = self._latents(batch, height, width, generator)
        timestep = torch.full((batch,), 500, device=latents.device)
        label = torch.randint(self.config.num_embeds_ada_norm, (batch,), generator=generator)
        return latents, timestep, {"label": label.to(latents.device)}


class Labels(nn.Embedding):
    """A label table of fewer than a thousand classes that has the stock pipeline's null class too.

    That is the last row here, whatever its number.
    """

    def forward(self, labels: Tensor) -> Tensor:
        """(batch,) to (batch, width)."""
        return super().forward(torch.where(labels == STOCK_NULL, self.num_embeddings - 1, labels))
