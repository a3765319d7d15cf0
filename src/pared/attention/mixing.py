"""What all replacements of an image's attention share: which layers, and the way in."""

from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family, Grid, Site, SiteKind
from pared.anatomy.sites import chosen, require_softmax
from pared.attention.processors import AttentionProcessor, Mixing
from pared.errors import InputError
from pared.method import Claim, Conversion
from pared.nn.layout import split_heads


class TokenMixer(Conversion):
    """A conversion that puts a new attention processor into attentions of the image.

    Attributes:
        kinds: which attentions; those of the image alone, unless a subclass serves others.
    """

    kinds: ClassVar[tuple[SiteKind, ...]] = ("self_attention",)

    layers: tuple[int, ...] | None = Field(
        default=None,
        description="indices of the blocks to convert, counted through the model; "
        "None converts all",
    )

    @abstractmethod
    def processor(self, site: Site, grid: Grid) -> nn.Module:
        """The new processor for one site, with freshly initialised weights."""

    def sites(self, family: Family) -> list[Site]:
        """The attentions of the chosen layers.

        Raises:
            InputError: a chosen layer doesn't exist or has no such attention.
        """
        return chosen(family, self.info.slug, self.kinds, self.layers)

    def claims(self, family: Family) -> list[Claim]:
        sites = self.sites(family)
        for site in sites:
            if not isinstance(cast(Any, site.module).processor, AttentionProcessor):
                require_softmax(site, self.info.slug)
        return [Claim(site.path, "replaces") for site in sites]

    def convert(self, model: nn.Module) -> None:
        family = anatomy.of(model)
        sites = self.sites(family)
        # What the model computes in; weights may be stored in a narrower type.
        dtype = cast(Any, family.model).dtype
        for site in sites:
            attn = cast(Any, site.module)
            processor = self.processor(site, family.grid(site))
            attn.set_processor(processor.to(next(attn.to_q.parameters()).device, dtype))
        Mixing(self, [site.path for site in sites]).watch(model)

    def healing(self, task: Any) -> Any:
        from pared.objectives.distillation import Distillation

        return Distillation(task)


class Processor(AttentionProcessor):
    """The processor of an attention of the image alone.

    Subclasses implement `mix`; projections, heads and output stay those of the attention it serves.
    """

    @abstractmethod
    def mix(self, attn: nn.Module, hidden_states: Tensor) -> Tensor:
        """Mixed tokens before the output projection; both (batch, tokens, width)."""

    def forward(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        if attention_mask is not None:
            raise InputError(
                f"{type(self).__name__} mixes all image tokens and takes no attention mask."
            )
        hidden_states = self.mix(attn, hidden_states)
        for layer in attn.to_out:  # a linear map, then dropout
            hidden_states = layer(hidden_states)
        return hidden_states


def projected(
    attn: Any, queries: Tensor, keys: Tensor | None = None, values: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value heads of an attention, normalised where it normalises them.

    Args:
        attn: has the projections and norms of a diffusers `Attention`.
        queries: what queries are projected from, (batch, tokens, width).
        keys: likewise; by default what queries are projected from.
        values: likewise.

    Returns:
        Each (batch, heads, tokens, channels).
    """
    q = split_heads(attn.to_q(queries), attn.heads)
    k = split_heads(attn.to_k(queries if keys is None else keys), attn.heads)
    v = split_heads(attn.to_v(queries if values is None else values), attn.heads)
    if attn.norm_q is not None:
        q, k = attn.norm_q(q), attn.norm_k(k)
    return q, k, v


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit` (groups of a GroupNorm)."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


def zero_(module: nn.Module) -> nn.Module:
    """Set all weights of `module` to zero; a residual branch that ends in it starts as nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module
