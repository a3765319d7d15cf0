"""Precision and recall of a generated set, from nearest neighbours (Kynkäänniemi et al. 2019)."""

from typing import NamedTuple

import torch

from pared.bench.distances.sets import BLOCK, euclidean, two_sets
from pared.errors import InputError


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: how much of the generated set is real, and of the reference is covered."""

    precision: float
    recall: float


def precision_recall(
    generated: torch.Tensor, reference: torch.Tensor, k: int = 3
) -> PrecisionRecall:
    """Improved precision and recall: shares inside the other set's k-nearest-neighbour balls.

    A ball reaches from its sample to its k-th nearest neighbour in its own set, and includes its
    surface.

    Args:
        generated: Features (n, dimensions).
        reference: Features (m, dimensions).
        k: Which neighbour sets the radius; fewer than the samples of either set.

    Returns:
        Precision, the share of generated samples inside the reference's balls, and recall, the
        share of reference samples inside the generated set's balls.
    """
    if k < 1:
        raise InputError(f"k is {k}; it must be at least 1.")
    generated, reference = two_sets(generated, reference, at_least=k + 1)
    return PrecisionRecall(
        precision=_share_inside(generated, reference, k),
        recall=_share_inside(reference, generated, k),
    )


def _share_inside(points: torch.Tensor, centres: torch.Tensor, k: int) -> float:
    """The share of the points that lie in a ball around any of the centres."""
    # The nearest of all is the sample itself, at distance 0, so the k-th neighbour comes k + 1st.
    neighbours = [euclidean(rows, centres).kthvalue(k + 1) for rows in centres.split(BLOCK)]
    radii = torch.cat([neighbour.values for neighbour in neighbours])
    inside = [(euclidean(rows, centres) <= radii).any(dim=1) for rows in points.split(BLOCK)]
    return torch.cat(inside).double().mean().item()
