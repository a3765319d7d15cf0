"""The Frechet distance between two sets of features, in one go or streamed, and its bias."""

import warnings

import torch

from pared.bench.checks import as_double, features, same_width
from pared.errors import InputError


def frechet_gaussians(
    mean_a: torch.Tensor,
    covariance_a: torch.Tensor,
    mean_b: torch.Tensor,
    covariance_b: torch.Tensor,
) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians.

    ||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}). The trace of the root is taken from the
    eigenvalues of the symmetric S_a^{1/2} S_b S_a^{1/2}, which has those of S_a S_b and, unlike it,
    real ones.

    Args:
        mean_a: Mean (dimensions,).
        covariance_a: Covariance (dimensions, dimensions).
        mean_b: Mean (dimensions,).
        covariance_b: Covariance (dimensions, dimensions).

    Returns:
        The squared distance, in squared feature units.
    """
    mean_a, covariance_a = as_double(mean_a), as_double(covariance_a)
    mean_b, covariance_b = as_double(mean_b), as_double(covariance_b)
    root_a = _square_root(covariance_a)
    product = root_a @ covariance_b @ root_a
    # Rounding makes eigenvalues of a singular product slightly negative.
    eigenvalues = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0)
    distance = (
        (mean_a - mean_b).square().sum()
        + covariance_a.trace()
        + covariance_b.trace()
        - 2 * eigenvalues.sqrt().sum()
    )
    return max(0.0, distance.item())


def _square_root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semi-definite matrix (dimensions, dimensions)."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.mT


class FrechetSums:
    """All that the Frechet distance needs of a set of features, gathered batch by batch.

    Holds the number of samples, their mean and their scatter about that mean (not plain sums of
    squares, which lose their digits when the mean is large). `update` and `merge` give what one
    pass over all samples would give, so sets can be streamed and gathered over processes.

    Attributes:
        count: Samples seen.
        mean: Their mean (dimensions,), float64 on the CPU.
        scatter: Sum of (x - mean)(x - mean)^T (dimensions, dimensions), float64 on the CPU.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    @classmethod
    def of(cls, batch: torch.Tensor) -> "FrechetSums":
        """The sums of one batch of features (samples, dimensions)."""
        batch = features(batch, "the batch")
        sums = cls(batch.shape[1])
        mean = batch.mean(dim=0)
        centred = batch - mean
        sums.count = batch.shape[0]
        sums.mean = mean.cpu()
        sums.scatter = (centred.mT @ centred).cpu()
        return sums

    def update(self, batch: torch.Tensor) -> "FrechetSums":
        """Takes in a batch of features (samples, dimensions); returns itself."""
        return self.merge(FrechetSums.of(batch))

    def merge(self, other: "FrechetSums") -> "FrechetSums":
        """Takes in the samples that another has seen, which is left as it is; returns itself."""
        same_width(self.mean[None], other.mean[None])
        total = self.count + other.count
        if total:
            shift = other.mean - self.mean
            between = shift.outer(shift) * (self.count * other.count / total)
            self.scatter = self.scatter + other.scatter + between
            self.mean = self.mean + shift * (other.count / total)
        self.count = total
        return self

    @property
    def covariance(self) -> torch.Tensor:
        """The unbiased covariance, scatter / (n - 1), (dimensions, dimensions)."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 samples; this set holds {self.count}.")
        return self.scatter / (self.count - 1)

    def distance(self, other: "FrechetSums") -> float:
        """Squared Frechet distance to another set; warns when a covariance is singular."""
        same_width(self.mean[None], other.mean[None])
        covariances = self.covariance, other.covariance
        _warn_if_singular(min(self.count, other.count), len(self.mean))
        return frechet_gaussians(self.mean, covariances[0], other.mean, covariances[1])


def _warn_if_singular(samples: int, dimensions: int) -> None:
    if samples <= dimensions:
        warnings.warn(
            f"{samples} samples of {dimensions} dimensions give a singular covariance, so the "
            f"Frechet distance is far too large; take more than {10 * dimensions} samples, or MMD.",
            stacklevel=3,
        )


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets (covariances over n - 1).

    Biased upwards by about `expected_frechet_bias`: use the same number of samples throughout a
    comparison, and many more samples than dimensions. Warns when a covariance is singular.

    Args:
        a: Features (n, dimensions).
        b: Features (m, dimensions).

    Returns:
        The squared distance, in squared feature units.
    """
    return FrechetSums.of(a).distance(FrechetSums.of(b))


def expected_frechet_bias(eigenvalues: torch.Tensor, n: int) -> float:
    """What `frechet` gives on average for two sets from one Gaussian, n samples in each.

    To first order in 1/n: (1/n) [3 sum_i l_i + sum_{i != j} l_i l_j / (l_i + l_j)]; with unit
    covariance 2 d/n + d (d + 1)/(2 n). Against an exact side, half as much.

    Args:
        eigenvalues: Eigenvalues l_i of the covariance (dimensions,), not negative.
        n: Samples on each side.

    Returns:
        The expected squared distance, in squared feature units.
    """
    if n < 2 or eigenvalues.ndim != 1 or (eigenvalues < 0).any():
        raise InputError(
            f"the bias needs n of at least 2 (got {n}) and a list of eigenvalues of a covariance, "
            "none of them negative."
        )
    values = as_double(eigenvalues)
    sums = values[:, None] + values[None, :]
    # Two directions without variance add nothing, where the formula reads 0/0.
    harmonic = values.outer(values) / sums.where(sums > 0, torch.ones_like(sums))
    between = harmonic.sum() - harmonic.trace()
    return ((3 * values.sum() + between) / n).item()
