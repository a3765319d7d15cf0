"""How an attention makes heads of tokens, and tokens of what it has mixed.

For methods that do the mixing themselves and leave projections, norms and rotations to the model.
"""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from pared.nn.layout import merge_heads, split_heads
from pared.nn.rotary import Rotary, rotate

PROJECTIONS = ("to_q", "to_k", "to_v")
ADDED_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj")


class Heads(NamedTuple):
    """Queries, keys and values of some tokens, each (batch, heads, tokens, channels)."""

    query: Tensor
    key: Tensor
    value: Tensor


class HeadLayout:
    """As diffusers' `Attention` and FLUX's have it: heads first, then norms, then rotations.

    Attributes:
        ignores_mask: whether the mask that these attentions are given is always all ones.
    """

    ignores_mask: ClassVar[bool] = False

    def rotary(self, given: dict[str, Any]) -> Rotary | None:
        """The rotations among the arguments of a call; (tokens, channels), or a batch of them."""
        found = given.get("image_rotary_emb")
        return None if found is None else Rotary(*found)

    def heads(
        self, attn: Any, x: Tensor, rotary: Rotary | None = None, added: bool = False
    ) -> Heads:
        """Heads of the tokens `x` (batch, tokens, width), normalised and rotated.

        Args:
            attn: the attention.
            x: what comes into it.
            rotary: rotations of these tokens.
            added: by the layers that the attention has for text alone.
        """
        projections = ADDED_PROJECTIONS if added else PROJECTIONS
        norms = ("norm_added_q", "norm_added_k") if added else ("norm_q", "norm_k")
        q, k, v = (split_heads(getattr(attn, name)(x), attn.heads) for name in projections)
        q, k = (
            normalised(getattr(attn, name), part) for name, part in zip(norms, (q, k), strict=True)
        )
        return Heads(turned(q, rotary), turned(k, rotary), v)

    def scale(self, attn: Any, tokens: int, given: dict[str, Any]) -> float | None:
        """What scores are multiplied by; None: one over the root of a head's channels.

        Args:
            attn: the attention.
            tokens: that are attended to.
            given: further arguments of the call.
        """
        return None

    def tokens(self, attn: Any, mixed: Tensor, added: bool = False) -> Tensor:
        """What the attention puts out for mixed heads (batch, heads, tokens, channels)."""
        x = merge_heads(mixed)
        if added:
            return x if attn.context_pre_only else attn.to_add_out(x)
        # A linear map, then dropout; one-stream blocks of FLUX have theirs outside.
        for layer in getattr(attn, "to_out", ()):
            x = layer(x)
        return x


def normalised(norm: Any, x: Tensor) -> Tensor:
    """`x` through a norm that some attentions don't have."""
    return x if norm is None else norm(x)


def turned(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Heads (batch, heads, tokens, channels) turned by the rotations of their tokens, if any."""
    if rotary is None:
        return x
    return rotate(x, Rotary(rotary.cos.unsqueeze(-3), rotary.sin.unsqueeze(-3)))
