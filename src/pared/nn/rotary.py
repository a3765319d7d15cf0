"""Rotary position embedding (RoFormer, arXiv 2104.09864): pairs of neighbouring channels turn.

The pair (2c, 2c + 1) of a token at position t turns by t theta_c, so that the product of a query
and a key depends on their content and on the difference of their positions alone. Other libraries
pair channel c with c + channels / 2 instead; `half_split` and `interleaved` lead from one layout to
the other and back.
"""

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


def rotary_of(positions: Tensor, channels: int, base: float = 10_000.0) -> Rotary:
    """The angles t theta_c, theta_c = base^(-2c / channels), of tokens at these positions.

    Args:
        positions: t, (tokens,), in a type precise enough for the angles: they reach t itself.
        channels: of a head; even.
        base: of the frequencies.

    Returns:
        In the type and on the device of `positions`.
    """
    pairs = torch.arange(0, channels, 2, dtype=positions.dtype, device=positions.device)
    angles = positions[:, None] * base ** (-pairs / channels)
    angles = angles.repeat_interleave(2, dim=-1)
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair of channels (2c, 2c + 1) by its angle; `x` (batch, heads, tokens, channels).

    Computed in float32 at least, and returned in the type of `x`.
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = precise.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (precise * rotary.cos + quarter_turn * rotary.sin).to(x.dtype)


def rotate_reference(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """The same by the matrix of each position, channels x channels. For tests."""
    channels = x.shape[-1]
    thetas = base ** (-torch.arange(0, channels, 2).to(x) / channels)
    matrices = x.new_zeros(len(positions), channels, channels)
    for c, theta in enumerate(thetas):
        angle, first, second = positions.to(x.dtype) * theta, 2 * c, 2 * c + 1
        matrices[:, first, first] = matrices[:, second, second] = angle.cos()
        matrices[:, first, second], matrices[:, second, first] = -angle.sin(), angle.sin()
    return torch.einsum("tij,...tj->...ti", matrices, x)


def half_split(x: Tensor) -> Tensor:
    """Channels (0, 1, 2, 3, ...) of the last dimension in the order (0, 2, ..., 1, 3, ...)."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def interleaved(x: Tensor) -> Tensor:
    """The inverse of `half_split`."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
