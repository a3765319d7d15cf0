"""Checks 1 to 4 and 6 of the card evaluation-metrics: Frechet, MMD, KID, precision and recall."""

import itertools
import math
import warnings

import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pared.bench.distances import (
    FrechetSums,
    coverage,
    expected_frechet_bias,
    frechet,
    frechet_gaussians,
    kernels,
    kid,
    median_bandwidth,
    mmd,
    mmd_test,
    precision_recall,
)
from pared.errors import InputError


class Identity(torch.nn.Module):
    """An encoder for torchmetrics whose features are its input."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=seeded(seed), dtype=dtype)


def skewed(n, d, seed):
    """Features with correlated dimensions and a mean far from 0, as encoders give them."""
    return normal(n, d, seed) @ normal(d, d, seed + 1) + 3 * normal(1, d, seed + 2)


# Check 1: exact values


def test_frechet_of_a_set_with_itself_is_zero():
    a = skewed(200, 16, 0)
    assert frechet(a, a) <= 1e-6 * a.mT.cov().trace().item()


def test_frechet_of_shifted_gaussians_is_the_squared_shift():
    identity, shift = torch.eye(8), torch.arange(8.0)
    distance = frechet_gaussians(torch.zeros(8), identity, shift, identity)
    assert distance == pytest.approx(shift.square().sum().item(), rel=1e-12)


def test_frechet_of_diagonal_gaussians():
    a, b = torch.rand(8, generator=seeded(0)), torch.rand(8, generator=seeded(1))
    distance = frechet_gaussians(torch.zeros(8), a.diag(), torch.zeros(8), b.diag())
    # The roots of float32 numbers agree to float32's rounding.
    assert distance == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-5)


def test_frechet_of_singular_gaussians():
    a, b = torch.tensor([4.0, 0.0, 0.0]), torch.tensor([1.0, 9.0, 0.0])
    distance = frechet_gaussians(torch.zeros(3), a.diag(), torch.zeros(3), b.diag())
    assert distance == pytest.approx(1 + 9, rel=1e-12)


def test_frechet_is_symmetric_and_survives_a_common_rotation():
    a, b = skewed(150, 12, 0), skewed(170, 12, 5)
    rotation = torch.linalg.qr(normal(12, 12, 9)).Q
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(a @ rotation, b @ rotation), rel=1e-9)


# Check 2: agreement with others, and with itself in pieces


def test_frechet_agrees_with_scipy():
    a, b = skewed(200, 16, 0), skewed(300, 16, 5)
    root = scipy.linalg.sqrtm(a.mT.cov().numpy() @ b.mT.cov().numpy()).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.mT.cov().trace() + b.mT.cov().trace()
    assert frechet(a, b) == pytest.approx(expected.item() - 2 * root.trace(), rel=1e-4)


def test_frechet_agrees_with_torchmetrics():
    a, b = skewed(200, 16, 0), skewed(300, 16, 5)
    theirs = FrechetInceptionDistance(feature=Identity(16)).set_dtype(torch.float64)
    theirs.update(a, real=False)
    theirs.update(b, real=True)
    assert frechet(a, b) == pytest.approx(theirs.compute().item(), rel=1e-4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 99), max_size=5))
def test_streamed_in_any_batches_is_the_same_as_at_once(cuts):
    # A mean a thousand times the spread: plain sums of squares would lose six digits here.
    a, b = normal(100, 4, 0) + 1000, normal(80, 4, 1) + 1000
    sums = FrechetSums(4)
    edges = [0, *sorted(set(cuts)), 100]
    for start, stop in itertools.pairwise(edges):
        sums.update(a[start:stop])
    assert sums.count == 100
    torch.testing.assert_close(sums.covariance, a.mT.cov(), rtol=1e-9, atol=1e-9)
    assert sums.distance(FrechetSums.of(b)) == pytest.approx(frechet(a, b), rel=1e-9)


def test_merged_processes_are_the_same_as_one():
    a, b = skewed(90, 6, 0), skewed(90, 6, 5)
    first = FrechetSums(6).update(a[:10]).update(a[10:40])
    second = FrechetSums(6).update(a[40:])
    merged = FrechetSums(6).merge(first).merge(second).merge(FrechetSums(6))
    assert (first.count, second.count, merged.count) == (40, 50, 90)
    assert merged.distance(FrechetSums.of(b)) == pytest.approx(frechet(a, b), rel=1e-9)


def test_half_precision_features_are_summed_in_double():
    a, b = normal(400, 4, 0).bfloat16(), normal(400, 4, 1).bfloat16()
    assert frechet(a, b) == frechet(a.double(), b.double())


def test_too_few_samples_warn_once():
    with pytest.warns(UserWarning, match="8 samples of 8 dimensions give a singular") as caught:
        frechet(normal(8, 8, 0), normal(50, 8, 1))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet(normal(9, 8, 0), normal(50, 8, 1))


# Check 3: the bias


def test_bias_of_unit_gaussians_in_closed_form():
    d, n = 16, 500
    expected = 2 * d / n + d * (d + 1) / (2 * n)
    assert expected_frechet_bias(torch.ones(d), n) == pytest.approx(expected, rel=1e-12)
    assert expected_frechet_bias(torch.ones(d), 2 * n) == pytest.approx(expected / 2, rel=1e-12)


def test_directions_without_variance_add_no_bias():
    with_zeros = torch.tensor([1.0, 2.0, 0.0, 0.0])
    assert expected_frechet_bias(with_zeros, 50) == expected_frechet_bias(with_zeros[:2], 50)


@pytest.mark.parametrize("eigenvalues", [torch.ones(16), torch.linspace(0.1, 4, 12)])
def test_bias_formula_holds_over_sixty_repeats(eigenvalues):
    d, scale = len(eigenvalues), eigenvalues.double().sqrt()
    exact = torch.zeros(d), eigenvalues.diag()
    means, one_sided = {}, []
    for n in (500, 1000):
        values = []
        for repeat in range(60):
            a, b = (FrechetSums.of(normal(n, d, 2 * repeat + i) * scale) for i in (0, 1))
            values.append(a.distance(b))
            if n == 500:
                one_sided.append(frechet_gaussians(a.mean, a.covariance, *exact))
        means[n] = math.fsum(values) / 60
        # 5 %: the standard error of 60 repeats is some 2 %, and terms in 1/n^2 add 1 %.
        assert means[n] == pytest.approx(expected_frechet_bias(eigenvalues, n), rel=0.05)
    assert means[500] / means[1000] == pytest.approx(2, rel=0.07)
    assert math.fsum(one_sided) / 60 == pytest.approx(means[500] / 2, rel=0.07)


# Check 4: MMD


def naive_mmd(a, b, kernel, unbiased):
    """The definition, pair by pair."""

    def within(x):
        pairs = [
            kernel(p, q)
            for i, p in enumerate(x)
            for j, q in enumerate(x)
            if not (unbiased and i == j)
        ]
        return math.fsum(pairs) / len(pairs)

    between = math.fsum(kernel(p, q) for p in a for q in b) / (len(a) * len(b))
    return within(a) + within(b) - 2 * between


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_is_its_definition(unbiased):
    a, b = normal(7, 3, 0), normal(5, 3, 1) + 0.5
    rbf = naive_mmd(a, b, lambda x, y: math.exp(-(x - y).square().sum() / (2 * 1.5**2)), unbiased)
    cubic = naive_mmd(a, b, lambda x, y: (float(x @ y) / 3 + 1) ** 3, unbiased)
    assert mmd(a, b, bandwidth=1.5, unbiased=unbiased) == pytest.approx(rbf, rel=1e-9)
    assert mmd(a, b, "polynomial", unbiased=unbiased) == pytest.approx(cubic, rel=1e-9)


def test_mmd_in_blocks_is_the_same(monkeypatch):
    a, b = normal(40, 3, 0), normal(30, 3, 1)
    whole = mmd(a, b), precision_recall(a, b)
    monkeypatch.setattr(kernels, "BLOCK", 7)
    monkeypatch.setattr(coverage, "BLOCK", 7)
    assert mmd(a, b) == pytest.approx(whole[0], rel=1e-12)
    assert precision_recall(a, b) == whole[1]


def test_unbiased_mmd_is_zero_on_average_and_takes_negative_values():
    values = torch.tensor([mmd(normal(50, 4, 2 * i), normal(40, 4, 2 * i + 1)) for i in range(60)])
    assert values.mean().abs() < 3 * values.std() / 60**0.5
    assert (values < 0).any() and (values > 0).any()


def test_biased_minus_unbiased_is_the_diagonal_terms():
    a, b, sigma = normal(30, 4, 0), normal(20, 4, 1), 1.3
    gap = mmd(a, b, bandwidth=sigma, unbiased=False) - mmd(a, b, bandwidth=sigma)
    expected = 0.0
    for x in (a, b):
        gram = torch.exp(-torch.cdist(x, x).square() / (2 * sigma**2))
        off = (gram.sum() - gram.trace()) / (len(x) * (len(x) - 1))
        expected += ((gram.diagonal().mean() - off) / len(x)).item()
    assert gap == pytest.approx(expected, rel=1e-9)


def test_permutation_p_values_are_uniform_under_the_null():
    p_values = [
        mmd_test(normal(15, 3, 2 * i), normal(20, 3, 2 * i + 1), 99, seeded(i)).p_value
        for i in range(100)
    ]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.05


def test_permutation_test_sees_a_difference():
    a, b = normal(60, 3, 0), normal(50, 3, 1) + 1
    result = mmd_test(a, b, 199, seeded(0))
    assert result.p_value == 1 / 200
    assert result.statistic == pytest.approx(mmd(a, b), rel=1e-9)


def test_permutation_test_counts_ties():
    # Two samples against two have three different splits, so no p-value is below 1/3.
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0], [11.0]])
    result = mmd_test(a, b, 300, seeded(0), bandwidth=5.0)
    assert result.p_value == pytest.approx(1 / 3, abs=0.08)  # 3 standard errors of 300 draws


def test_bandwidth_is_the_median_distance():
    assert median_bandwidth(torch.tensor([[0.0], [1.0], [10.0]])) == 9.0
    many = normal(2500, 2, 0)
    # Two thousand of the samples stand for all.
    assert median_bandwidth(many) == pytest.approx(torch.pdist(many).median().item(), rel=0.02)


def test_kid_agrees_with_torchmetrics():
    a, b = skewed(60, 8, 0), skewed(60, 8, 5)
    theirs = KernelInceptionDistance(feature=Identity(8), subsets=1, subset_size=60)
    theirs.update(a, real=False)
    theirs.update(b, real=True)
    ours = kid(a, b, seeded(0), subsets=1, subset_size=60)
    assert ours.mean == pytest.approx(theirs.compute()[0].item(), rel=1e-4)
    assert ours.std == 0


def test_kid_over_subsets_is_near_the_whole():
    a, b = normal(200, 4, 0), normal(200, 4, 1) + 0.5
    value = kid(a, b, seeded(0), subsets=50, subset_size=50)
    again = kid(a, b, seeded(0), subsets=50, subset_size=50)
    assert value == again
    # Overlapping subsets scatter by std / sqrt(50) at most.
    assert value.mean == pytest.approx(mmd(a, b, "polynomial"), abs=3 * value.std / 50**0.5)


# Precision and recall


def test_precision_recall_on_a_line():
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    generated = torch.tensor([[0.5], [4.0], [5.0], [1.0]])
    # k = 1: every reference ball has radius 1, so 0.5, 1 and 4 (on the surface of 3's) are inside.
    # Generated radii are 0.5, 1, 1, 0.5: 0, 1, and 3 are covered, 2 is not.
    assert precision_recall(generated, reference, k=1) == (0.75, 0.75)


def test_a_set_covers_itself():
    a = normal(50, 4, 0)
    assert precision_recall(a, a) == (1.0, 1.0)


def mixture(modes, n, seed):
    """Samples of well separated clusters on a circle, one for each of the modes (of 8)."""
    labels = torch.tensor(modes)[torch.arange(n) % len(modes)]
    angles = labels * (2 * math.pi / 8)
    centres = 10 * torch.stack([angles.cos(), angles.sin()], dim=1).double()
    return centres + normal(n, 2, seed)


# Check 6: monotonicity


def test_dropping_modes_lowers_recall_not_precision():
    reference = mixture(range(8), 400, 0)
    full = precision_recall(mixture(range(8), 400, 1), reference)
    half = precision_recall(mixture(range(4), 400, 1), reference)
    # Half of the reference is out of reach; precision moves only by sampling (some 2 points).
    assert half.recall == pytest.approx(full.recall / 2, abs=0.05)
    assert half.precision == pytest.approx(full.precision, abs=0.05)


def test_distances_grow_with_every_dropped_mode():
    reference = mixture(range(8), 800, 0)
    sigma = median_bandwidth(reference)
    candidates = [mixture(range(kept), 800, 1) for kept in (8, 7, 6, 5, 4)]
    for distance in (frechet, lambda a, b: mmd(a, b, bandwidth=sigma)):
        values = [distance(candidate, reference) for candidate in candidates]
        assert values == sorted(values)


def pictures(n, seed):
    """Grey images (n, 1, 32, 32) of a bright disc each, of random place and size."""
    places = 8 + 16 * torch.rand(n, 2, 1, 1, generator=seeded(seed))
    radii = 3 + 5 * torch.rand(n, 1, 1, generator=seeded(seed + 1))
    axis = torch.arange(32.0)
    distances = ((axis[:, None] - places[:, 0]) ** 2 + (axis - places[:, 1]) ** 2).sqrt()
    return torch.sigmoid(3 * (radii - distances))[:, None]


def encode(images):
    """Mean and spread of the responses to 8 random filters: a fixed toy encoder (n, 16)."""
    filters = torch.randn(8, 1, 5, 5, generator=seeded(7)) / 5
    responses = torch.nn.functional.conv2d(images, filters).relu().flatten(2)
    return torch.cat([responses.mean(dim=2), responses.std(dim=2)], dim=1)


def add_noise(images, level):
    # Little enough that the rbf kernel, a few bandwidths wide, doesn't saturate at 1.
    return images + 0.02 * level * torch.randn(images.shape, generator=seeded(3))


def blur(images, level):
    for _ in range(level):
        images = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    return images


@pytest.mark.parametrize("damage", [add_noise, blur])
def test_distances_order_the_levels_of_damage(damage):
    reference, images = encode(pictures(400, 0)), pictures(400, 10)
    candidates = [encode(damage(images, level)) for level in range(5)]
    sigma = median_bandwidth(reference)
    for distance in (
        frechet,
        lambda a, b: kid(a, b, seeded(0), subsets=1, subset_size=400).mean,
        lambda a, b: mmd(a, b, bandwidth=sigma),
    ):
        values = [distance(candidate, reference) for candidate in candidates]
        assert values == sorted(values)


# What can't be measured


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet(torch.zeros(3, 2), torch.zeros(3, 4)), "2 and 4 dimensions"),
        (lambda: frechet(torch.zeros(3), torch.zeros(3)), r"shape \(3,\)"),
        (lambda: frechet(torch.zeros(1, 2), torch.zeros(3, 2)), "at least 2 samples"),
        (lambda: frechet(torch.full((3, 2), torch.nan), torch.zeros(3, 2)), "NaN"),
        (lambda: mmd(torch.zeros(1, 2), torch.zeros(3, 2)), "1 and 3 samples"),
        (lambda: mmd(torch.zeros(3, 2), torch.zeros(3, 2)), "most samples are the same"),
        (lambda: mmd(torch.zeros(3, 2), torch.zeros(3, 2), kernel="linear"), '"linear"'),
        (lambda: mmd(torch.zeros(3, 2), torch.zeros(3, 2), bandwidth=0), "the bandwidth is 0"),
        (lambda: mmd(torch.zeros(3, 2), torch.zeros(3, 2), bandwidth="mean"), "'mean'"),
        (lambda: median_bandwidth(torch.zeros(1, 2)), "at least 2 samples"),
        (lambda: kid(torch.zeros(9, 2), torch.zeros(9, 2), seeded(0)), "subsets of 1000"),
        (lambda: mmd_test(torch.zeros(3, 2), torch.ones(3, 2), 0, seeded(0)), "permutations is 0"),
        (lambda: precision_recall(torch.zeros(3, 2), torch.ones(9, 2)), "at least 4 in each"),
        (lambda: precision_recall(torch.zeros(3, 2), torch.ones(9, 2), k=0), "k is 0"),
        (lambda: expected_frechet_bias(torch.tensor([-1.0]), 10), "eigenvalues"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
