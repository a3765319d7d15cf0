"""The maximum mean discrepancy between two sets of features: MMD, KID and a permutation test."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from pared.bench.checks import features
from pared.bench.distances.sets import BLOCK, euclidean, two_sets
from pared.errors import InputError

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Samples that the median heuristic looks at; the median of two million pairs is steady enough.
MEDIAN_SAMPLES = 2000


def median_bandwidth(x: torch.Tensor) -> float:
    """The median heuristic: the median distance between two different samples.

    To compare several candidates, take it once, from the reference, and pass it to every `mmd`:
    with another kernel for each candidate the distances are not comparable.

    Args:
        x: Features (samples, dimensions); of more than 2,000, that many evenly spaced rows count.

    Returns:
        The bandwidth sigma of the kernel, in feature units.
    """
    x = features(x, "the set")
    if len(x) > MEDIAN_SAMPLES:
        x = x[torch.linspace(0, len(x) - 1, MEDIAN_SAMPLES, device=x.device).long()]
    rows, columns = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    if len(rows) == 0:
        raise InputError("a median distance needs at least 2 samples; the set holds 1.")
    median = euclidean(x, x)[rows, columns].median().item()
    if median == 0:
        raise InputError(
            "most samples are the same, so their median distance is 0; pass a bandwidth above 0."
        )
    return median


def mmd(
    a: torch.Tensor,
    b: torch.Tensor,
    kernel: str = "rbf",
    bandwidth: float | str = "median",
    unbiased: bool = True,
) -> float:
    """Squared maximum mean discrepancy of two sets.

    With the rbf kernel it tells near sets apart and saturates for sets many bandwidths apart,
    where the polynomial kernel and the Frechet distance go on growing.

    Args:
        a: Features (n, dimensions).
        b: Features (m, dimensions).
        kernel: "rbf", exp(-||x - y||^2 / (2 sigma^2)), or "polynomial", (<x, y>/d + 1)^3.
        bandwidth: sigma of the rbf kernel in feature units, or "median" for `median_bandwidth` of
            the pooled sets. The polynomial kernel has none.
        unbiased: True for the U-statistic (samples are not paired with themselves; 0 on average
            for equal distributions, so at times negative), False for the V-statistic (never
            negative, and above 0 for equal distributions by an amount that falls as 1/n).

    Returns:
        The squared discrepancy.
    """
    a, b = two_sets(a, b, at_least=2 if unbiased else 1)
    k = _kernel(kernel, bandwidth, torch.cat([a, b]))
    return (
        _mean_within(a, k, unbiased)
        + _mean_within(b, k, unbiased)
        - 2 * _kernel_sum(a, b, k) / (len(a) * len(b))
    )


class Kid(NamedTuple):
    """A kernel inception distance: its mean over the subsets and their standard deviation.

    The subsets overlap, so `std` is not the sampling error of `mean`.
    """

    mean: float
    std: float


def kid(
    a: torch.Tensor,
    b: torch.Tensor,
    generator: torch.Generator,
    subsets: int = 100,
    subset_size: int = 1000,
) -> Kid:
    """Kernel inception distance: unbiased MMD^2 with the polynomial kernel, over random subsets.

    Args:
        a: Features (n, dimensions).
        b: Features (m, dimensions).
        generator: Draws the subsets (a CPU generator).
        subsets: How many.
        subset_size: Samples in each, drawn without replacement.

    Returns:
        Mean and standard deviation over the subsets (papers print them times 1,000).
    """
    a, b = two_sets(a, b, at_least=2)
    if not 2 <= subset_size <= min(len(a), len(b)) or subsets < 1:
        raise InputError(
            f"{subsets} subsets of {subset_size} can't be drawn from {len(a)} and {len(b)} "
            "samples; take at least 1 subset, of 2 samples up to the smaller set."
        )
    values = [
        mmd(
            _draw(a, subset_size, generator),
            _draw(b, subset_size, generator),
            kernel="polynomial",
        )
        for _ in range(subsets)
    ]
    spread = torch.tensor(values, dtype=torch.float64).std(correction=0)
    return Kid(math.fsum(values) / subsets, spread.item())


class MmdTest(NamedTuple):
    """A permutation test: the squared discrepancy, and how often chance gives as much."""

    statistic: float
    p_value: float


def mmd_test(
    a: torch.Tensor,
    b: torch.Tensor,
    permutations: int,
    generator: torch.Generator,
    kernel: str = "rbf",
    bandwidth: float | str = "median",
) -> MmdTest:
    """Tests whether two sets come from one distribution, by shuffling who belongs to which.

    The p-value is (1 + permutations with at least the observed MMD^2) / (1 + permutations), which
    is valid for any number of permutations. Holds the whole kernel matrix, (n + m)^2 numbers.

    Args:
        a: Features (n, dimensions).
        b: Features (m, dimensions).
        permutations: How often to shuffle; the smallest p-value is 1 / (1 + permutations).
        generator: Draws the permutations (a CPU generator).
        kernel: As in `mmd`.
        bandwidth: As in `mmd`.

    Returns:
        The unbiased MMD^2 and its p-value.
    """
    a, b = two_sets(a, b, at_least=2)
    if permutations < 1:
        raise InputError(f"permutations is {permutations}; a test needs at least 1.")
    pooled = torch.cat([a, b])
    n, m = len(a), len(b)
    gram = _kernel(kernel, bandwidth, pooled)(pooled, pooled).fill_diagonal_(0)

    # The first row is the true split, so that it goes through the same arithmetic as the others.
    orders = [torch.arange(n + m)]
    orders += [torch.randperm(n + m, generator=generator) for _ in range(permutations)]
    in_a = torch.zeros(permutations + 1, n + m, dtype=torch.float64)
    in_a.scatter_(1, torch.stack(orders)[:, :n], 1.0)
    in_a = in_a.to(gram.device)
    in_b = 1 - in_a

    to_a = in_a @ gram
    within_a = (to_a * in_a).sum(dim=1) / (n * (n - 1))
    between = (to_a * in_b).sum(dim=1) / (n * m)
    within_b = ((in_b @ gram) * in_b).sum(dim=1) / (m * (m - 1))
    statistics = within_a + within_b - 2 * between

    # The same split in another order differs by rounding, and must count as a tie.
    rounding = 1e-12 * gram.abs().max()
    as_extreme = (statistics[1:] >= statistics[0] - rounding).sum().item()
    return MmdTest(statistics[0].item(), (1 + as_extreme) / (1 + permutations))


def _draw(x: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    return x[torch.randperm(len(x), generator=generator)[:size].to(x.device)]


def _kernel(name: str, bandwidth: float | str, pooled: torch.Tensor) -> Kernel:
    if name == "polynomial":
        return lambda x, y: (x @ y.mT / x.shape[1] + 1) ** 3
    if name != "rbf":
        raise InputError(f'the kernel is "{name}"; it must be "rbf" or "polynomial".')
    sigma = median_bandwidth(pooled) if bandwidth == "median" else bandwidth
    if isinstance(sigma, str) or not 0 < sigma < math.inf:
        raise InputError(f'the bandwidth is {sigma!r}; it must be a number above 0 or "median".')
    return lambda x, y: torch.exp(-euclidean(x, y).square() / (2 * sigma**2))


def _kernel_sum(x: torch.Tensor, y: torch.Tensor, k: Kernel) -> float:
    """The sum of k over all pairs of a row of x and a row of y."""
    return math.fsum(k(rows, y).sum().item() for rows in x.split(BLOCK))


def _mean_within(x: torch.Tensor, k: Kernel, unbiased: bool) -> float:
    """The mean of k over the pairs of one set, without each sample's own if unbiased."""
    n, total = len(x), _kernel_sum(x, x, k)
    if not unbiased:
        return total / n**2
    own = math.fsum(k(rows, rows).trace().item() for rows in x.split(BLOCK))
    return (total - own) / (n * (n - 1))
