"""How far maps of attention are from what a mean does: weigh all alike, for everyone the same."""

import torch
from torch import Tensor


def unlike_a_mean(maps: Tensor) -> Tensor:
    """Of each head: exp(entropy) over the keys, and the distance from the common map.

    The first is 1 and the second 0 where all keys weigh all alike. The distance of a query's map
    from the mean map of all queries is the share of its weight that lies elsewhere (total
    variation).

    Args:
        maps: (heads, queries, keys); rows sum to 1.

    Returns:
        (heads, 2).
    """
    entropy = -torch.xlogy(maps, maps).sum(dim=-1)
    apart = (maps - maps.mean(dim=-2, keepdim=True)).abs().sum(dim=-1) / 2
    return torch.stack([entropy.exp().mean(dim=-1) / maps.shape[-1], apart.mean(dim=-1)], dim=-1)
