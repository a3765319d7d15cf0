"""Moving between token sequences, feature maps and heads without copies."""

from torch import Tensor


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(batch, height * width, channels) as a (batch, channels, height, width) view.

    The view is in channels-last memory with every stride in order, batches of one included, so
    that convolutions take it as it is; `transpose(1, 2).view(...)` would make them copy.
    """
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def to_tokens(feature_map: Tensor) -> Tensor:
    """(batch, channels, height, width) as (batch, height * width, channels)."""
    return feature_map.flatten(2).transpose(1, 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * channels) as (batch, heads, tokens, channels)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, tokens, channels) as (batch, tokens, heads * channels)."""
    return x.transpose(1, 2).flatten(2)
