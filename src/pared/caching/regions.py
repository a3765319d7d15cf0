"""Which regions of a picture a step refines: the selection of region-adaptive sampling.

arXiv 2502.10389, section 3: pure functions of tensors, used by `ras`.
"""

from typing import Literal

import torch
from torch import Tensor

Metric = Literal["std", "norm"]

# Patches that nothing changes; their logarithm is finite.
TINY = torch.finfo(torch.float32).tiny


def patch_metric(update: Tensor, metric: Metric) -> Tensor:
    """m of every patch: the standard deviation or norm over channels, the mean over its pixels.

    Args:
        update: what the last step added to the latents, (batch, patches, channels, pixels).
        metric: "std" or "norm".

    Returns:
        (batch, patches), in float32.
    """
    update = update.float()
    by_pixel = update.std(dim=2, correction=0) if metric == "std" else update.norm(dim=2)
    return by_pixel.mean(dim=-1)


def active_count(patches: int, ratio: float, more: int = 0, quantum: int = 1) -> int:
    """Active patches of a step: n - n_skip, up to the next multiple of `quantum`.

    Args:
        patches: n.
        ratio: share of the active ones; n_skip = int((1 - ratio) n) + more.
        more: patches that are skipped beyond that share.
        quantum: as few sizes as possible make few compiled graphs.
    """
    active = patches - int((1 - ratio) * patches) - more
    return min(max(-(-active // quantum), 1) * quantum, patches)


def active_set(
    metric: Tensor,
    skips: Tensor,
    active: int,
    high_ratio: float = 1.0,
    k: float = 1.0,
    upstream_compat: bool = False,
) -> Tensor:
    """The patches that a step computes: those of low m, unless they were skipped too often.

    Of the n_skip others a share of `high_ratio` are those with the highest m exp(-k D), that is the
    lowest priority exp(k D) / m; the rest are those with the lowest m exp(k D) among what is left.
    So D makes patches active again at either end.

    Args:
        metric: m, (batch, patches), not negative.
        skips: D, how often each patch was skipped, (batch, patches).
        active: patches to choose.
        high_ratio: rho.
        k: weight of D.
        upstream_compat: rank the highest by m exp(k D), as the released code does: what was
            skipped is then ever more likely to be skipped again.

    Returns:
        Their numbers, (batch, active), in rising order.
    """
    patches = metric.shape[1]
    highest = int(high_ratio * (patches - active))
    lowest = patches - active - highest
    # Logarithms rank alike, and don't overflow after many steps.
    level, starved = metric.clamp(min=TINY).log(), k * skips
    skipped = torch.zeros_like(metric, dtype=torch.bool)
    high = level + starved if upstream_compat else level - starved
    # Sorting that is stable makes equal patches skipped in their order, on every device.
    skipped.scatter_(1, high.argsort(dim=1, stable=True)[:, patches - highest :], True)
    low = (level + starved).masked_fill(skipped, torch.inf)
    skipped.scatter_(1, low.argsort(dim=1, stable=True)[:, :lowest], True)
    return skipped.byte().argsort(dim=1, stable=True)[:, :active].clone()
