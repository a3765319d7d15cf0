"""Normalised linear attention: softmax attention's weighted mean with a kernel that factorises.

With non-negative features q_i, k_j (Katharopoulos et al. 2020, arXiv 2006.16236, equation 5):

    y_i = q_i (sum_j k_j^T v_j) / (q_i . sum_j k_j + eps)

`linear_attention` uses the factorised right-hand side, linear in tokens;
`linear_attention_reference` builds the explicit N x M weights and is the oracle of the tests.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """Weighted mean of `value` with weights query . key, in float32, in time linear in tokens.

    Args:
        query: non-negative features, (batch, heads, queries, channels).
        key: non-negative features, (batch, heads, keys, channels).
        value: (batch, heads, keys, value channels).
        eps: added to the denominator; a query whose features are all zero gives zero.

    Returns:
        (batch, heads, queries, value channels), in the type of `value`.
    """
    with full_precision(value):
        # Both sums are divided by the number of keys: the ratio stays, and long sequences can't
        # overflow.
        k = key.float() / key.shape[-2]
        state = k.transpose(-1, -2) @ value.float()  # (batch, heads, channels, value channels)
        total = k.sum(dim=-2).unsqueeze(-1)  # (batch, heads, channels, 1)
        q = query.float()
        y = (q @ state) / (q @ total + eps)
    return clipped(y, value.dtype)


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context without autocast on the device of `x` (the meta device knows none)."""
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def linear_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15
) -> Tensor:
    """The same through the explicit queries x keys matrix of weights. Quadratic; for tests."""
    weights = query @ key.transpose(-1, -2) / key.shape[-2]
    weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
    return weights @ value


def clipped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; float16 is clipped to its range instead of overflowing."""
    if dtype == torch.float16:
        x = x.clamp(-65504, 65504)
    return x.to(dtype)
