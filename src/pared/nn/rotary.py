"""Rotary position embedding (RoFormer, arXiv 2104.09864) as FLUX has it: pairs of neighbours."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Cosines and sines of every token's angles, both (tokens, channels); a pair shares its angle.

    The form in which diffusers hands them to attention processors.
    """

    cos: Tensor
    sin: Tensor

    def at(self, tokens: slice | Tensor) -> "Rotary":
        """Those of some tokens."""
        return Rotary(self.cos[tokens], self.sin[tokens])


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair of channels (2c, 2c + 1) by its angle; `x` (batch, heads, tokens, channels).

    Computed in float32 at least, and returned in the type of `x`.
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = precise.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (precise * rotary.cos + quarter_turn * rotary.sin).to(x.dtype)
