"""Normalised linear attention: softmax attention's weighted mean with a kernel that factorises.

With non-negative features q_i, k_j (Katharopoulos et al. 2020, arXiv 2006.16236, equation 5):

    y_i = q_i (sum_j k_j^T v_j) / (q_i . sum_j k_j + eps)

`linear_attention` uses the factorised right-hand side, linear in tokens;
`linear_attention_reference` builds the explicit N x M weights and is the oracle of the tests.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Weighted mean of `value` with weights query . key, in time linear in tokens.

    Sums are taken in float32 (in float64 where the inputs are). Without gradients bfloat16 is kept
    between the two products, which accumulate in float32 all the same: that costs an error of half
    a percent and saves half the time.

    Args:
        query: non-negative features, (batch, heads, queries, channels).
        key: non-negative features, (batch, heads, keys, channels).
        value: (batch, heads, keys, value channels).

    Returns:
        (batch, heads, queries, value channels), in the type of `value`. A query whose features are
        all zero gives zero.
    """
    dtype = value.dtype
    differentiated = torch.is_grad_enabled() and (query.requires_grad or value.requires_grad)
    if dtype == torch.float16 or (dtype == torch.bfloat16 and differentiated):
        query, key, value = query.float(), key.float(), value.float()
    else:  # under autocast, normalised queries and keys come in float32
        query, key = query.to(dtype), key.to(dtype)
    with full_precision(value):
        # Means over keys instead of sums: the ratio stays, and long sequences can't overflow.
        key = key / key.shape[-2]
        state = key.transpose(-1, -2) @ value  # (batch, heads, channels, value channels)
        total = key.sum(dim=-2, dtype=torch.promote_types(key.dtype, torch.float32))
        # The denominator is one more column of the same product.
        y = query @ torch.cat([state, total.unsqueeze(-1).to(state.dtype)], dim=-1)
        numerator, denominator = y.split([value.shape[-1], 1], dim=-1)
        return clipped(numerator / (denominator + 1e-15), dtype)


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context without autocast on the device of `x` (the meta device knows none)."""
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def linear_attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same through the explicit queries x keys matrix of weights. Quadratic; for tests."""
    weights = query @ key.transpose(-1, -2) / key.shape[-2]
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-15)
    return weights @ value


def clipped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; float16 is clipped to its range instead of overflowing."""
    if dtype == torch.float16:
        x = x.clamp(-65504, 65504)
    return x.to(dtype)
