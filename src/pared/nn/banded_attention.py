"""Softmax attention with its log-sum-exp: dense, and within a band of the token order.

With scores a_ij = q_i . k_j / sqrt(channels) and a set S_i of keys for each query,

    output_i = sum_{j in S_i} e^{a_ij} v_j / sum_{j in S_i} e^{a_ij}
    lse_i    = log sum_{j in S_i} e^{a_ij}

The log-sum-exp is what puts attentions over different keys in proportion: `merged` makes one of two
that share no key. Nothing here builds a map of all queries by all keys, save
`banded_attention_reference`, the oracle of the tests. Computed in float32 at least.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.nn.linear_attention import full_precision

# Queries that `dense_attention` takes at a time, which bounds its memory.
QUERIES = 256
# Queries that share a window of keys, at least: below, products are too small to be quick.
SHORTEST = 16


class Attended(NamedTuple):
    """The result of an attention.

    Attributes:
        output: (batch, heads, queries, channels), float32 at least.
        lse: logarithm of the softmax denominator, (batch, heads, queries, 1), likewise.
    """

    output: Tensor
    lse: Tensor


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Attended:
    """Attention to all keys; tensors (batch, heads, queries or keys, channels)."""
    with full_precision(value):
        query, key, value = _scaled(query, key, value)
        parts = [_attended(q @ key.mT, value) for q in query.split(QUERIES, dim=-2)]
        return Attended(*(torch.cat(part, dim=-2) for part in zip(*parts, strict=True)))


def banded_attention(query: Tensor, key: Tensor, value: Tensor, half: int) -> Attended:
    """Attention to the keys with |i - j| <= `half`, at a cost linear in tokens.

    Blocks of neighbouring queries share a window of keys, `half` wider on either side; what a
    window holds beyond a query's own band is masked. At the borders the band is clipped.

    Args:
        query: (batch, heads, tokens, channels).
        key: likewise.
        value: likewise.
        half: keys seen on either side of a query, at least 0.
    """
    tokens = query.shape[-2]
    half = min(half, tokens - 1)
    block = max(half, SHORTEST)
    window, filling = block + 2 * half, -tokens % block
    with full_precision(value):
        query, key, value = _scaled(query, key, value)
        query = F.pad(query, (0, 0, 0, filling)).unflatten(-2, (-1, block))
        # Windows that overlap, each as wide as `window`, along the last dimension.
        key, value = (
            F.pad(x, (0, 0, half, half + filling)).unfold(-2, window, block) for x in (key, value)
        )
        seen = _seen(tokens, block, half, query.device)
        output, lse = _attended((query @ key).masked_fill(~seen, -torch.inf), value.mT)
    return Attended(*(x.flatten(2, 3)[:, :, :tokens] for x in (output, lse)))


def _seen(tokens: int, block: int, half: int, device: torch.device) -> Tensor:
    """Which keys of its window a query sees: (blocks, block, window), bool."""
    row = torch.arange(block, device=device)[:, None]
    column = torch.arange(block + 2 * half, device=device)
    start = torch.arange(0, tokens, block, device=device)[:, None, None]
    # Column c of the window is token start + c - half, so query r has distance c - half - r.
    distance, token = column - half - row, start + column - half
    within = (distance.abs() <= half) & (token >= 0) & (token < tokens)
    # Queries that only fill up the last block see themselves: a softmax over nothing is no number.
    return within | (distance == 0)


def banded_attention_reference(query: Tensor, key: Tensor, value: Tensor, half: int) -> Attended:
    """The same through the whole map, tokens x tokens. Quadratic; for tests."""
    query, key, value = _scaled(query, key, value)
    token = torch.arange(query.shape[-2], device=query.device)
    outside = (token[:, None] - token).abs() > half
    return _attended((query @ key.mT).masked_fill(outside, -torch.inf), value)


def merged(first: Attended, second: Attended) -> Attended:
    """Attention to the keys of both, from attentions to sets of keys that have none in common."""
    lse = torch.logaddexp(first.lse, second.lse)
    output = sum(part.output * (part.lse - lse).exp() for part in (first, second))
    return Attended(output, lse)


def _scaled(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All in float32 at least, and the queries over the root of the channels."""
    precise = torch.promote_types(value.dtype, torch.float32)
    query, key, value = (x.to(precise) for x in (query, key, value))
    return query * query.shape[-1] ** -0.5, key, value


def _attended(scores: Tensor, value: Tensor) -> Attended:
    """From scores (..., queries, keys) and values (..., keys, channels)."""
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return Attended((scores - lse).exp() @ value, lse)
