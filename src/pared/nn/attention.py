"""Softmax attention as a transformers model was set to compute it: fused, step by step, or else."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T) v by the implementation that `set_attn_implementation` chose.

    Args:
        module: knows the choice, `module.config`.
        query: (batch, heads, frames, channels).
        key: (batch, heads, keys, channels).
        value: shaped like the keys.
        mask: True where a key is heard, broadcast to (batch, heads, frames, keys); None: all are.
        scale: of the scores; by default 1 / sqrt(channels).
        dropout: rate on the attention map in training.

    Returns:
        (batch, frames, heads x channels).
    """
    config: Any = module.config
    function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    settings = {
        "scaling": query.shape[-1] ** -0.5 if scale is None else scale,
        "dropout": dropout if module.training else 0.0,
        "is_causal": False,
    }
    return function(module, query, key, value, mask, **settings)[0].flatten(-2)


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The implementation "eager", step by step and with the map, as transformers calls it."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    weights = nn.functional.dropout(scores.softmax(dim=-1), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights
