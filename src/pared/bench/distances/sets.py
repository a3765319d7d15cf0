"""What the distances between two sets share."""

import torch

from pared.bench.checks import features, same_width
from pared.errors import InputError

# Rows of a kernel or distance matrix that are held at once.
BLOCK = 1024


def two_sets(a: torch.Tensor, b: torch.Tensor, at_least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks two sets (n, dimensions), (m, dimensions) of one encoder; returns them in float64."""
    a, b = features(a, "the first set"), features(b, "the second set")
    same_width(a, b)
    if min(len(a), len(b)) < at_least:
        raise InputError(
            f"the sets hold {len(a)} and {len(b)} samples; this measure needs at least {at_least} "
            "in each."
        )
    return a, b


def euclidean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (n, m), exactly 0 between copies, unlike the faster form by products."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
