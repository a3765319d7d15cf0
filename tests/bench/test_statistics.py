"""Spread and bootstrap intervals, against closed forms and by how often they are right."""

import math

import pytest
import torch

from pared.bench.statistics import Difference, bootstrap_interval, paired_difference, spread
from pared.errors import InputError


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(n, seed):
    return torch.randn(n, generator=seeded(seed), dtype=torch.float64)


def test_spread_by_hand():
    mean, std, standard_error = spread(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3
    assert std == pytest.approx((14 / 3) ** 0.5)
    assert standard_error == pytest.approx((14 / 12) ** 0.5)


def test_one_seed_has_no_spread():
    mean, std, standard_error = spread(torch.tensor([2.5]))
    assert mean == 2.5
    assert math.isnan(std) and math.isnan(standard_error)


def test_interval_is_that_of_the_normal_approximation():
    values = normal(400, 0)
    low, high = bootstrap_interval(values, seeded(1))
    mean, _, standard_error = spread(values)
    # Percentiles of 2,000 resamples are good to some 5 % of the standard error.
    assert low == pytest.approx(mean - 1.96 * standard_error, abs=0.15 * standard_error)
    assert high == pytest.approx(mean + 1.96 * standard_error, abs=0.15 * standard_error)


def test_interval_repeats_with_its_seed_and_widens_with_its_level():
    values = normal(50, 0)
    narrow = bootstrap_interval(values, seeded(1), level=0.5)
    wide = bootstrap_interval(values, seeded(1), level=0.99)
    assert bootstrap_interval(values, seeded(1), level=0.5) == narrow
    assert wide.low < narrow.low < narrow.high < wide.high


def test_interval_of_equal_values_is_a_point():
    assert bootstrap_interval(torch.full((5,), 0.5), seeded(0)) == (0.5, 0.5)


@pytest.mark.slow
def test_interval_holds_the_truth_as_often_as_it_says():
    intervals = [bootstrap_interval(normal(60, i), seeded(i), level=0.9) for i in range(200)]
    share = sum(low <= 0 <= high for low, high in intervals) / 200
    # 3 standard errors of 200 draws at 0.9 are 0.064.
    assert share == pytest.approx(0.9, abs=0.07)


def test_pairing_decides_what_two_means_could_not():
    difficulty = 10 * normal(50, 0)
    a, b = difficulty + 0.5 + 0.1 * normal(50, 1), difficulty
    paired = paired_difference(a, b, seeded(2))
    assert paired.mean == pytest.approx((a - b).mean().item())
    assert paired.decided and 0.4 < paired.low < paired.mean < paired.high < 0.6
    shuffled = b[torch.randperm(50, generator=seeded(3))]
    assert not paired_difference(a, shuffled, seeded(2)).decided


def test_a_difference_turns_with_its_sides():
    a, b = normal(30, 0), normal(30, 1)
    there, back = paired_difference(a, b, seeded(2)), paired_difference(b, a, seeded(2))
    assert there == pytest.approx((-back.mean, -back.high, -back.low))


def test_touching_zero_is_undecided():
    assert not Difference(0.1, 0.0, 0.2).decided
    assert Difference(-0.1, -0.2, -0.01).decided


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spread(torch.tensor([])), r"shape \(0,\)"),
        (lambda: spread(torch.ones(2, 2)), r"shape \(2, 2\)"),
        (lambda: spread(torch.tensor([1.0, torch.nan, torch.inf])), "2 of 3 values are NaN"),
        (lambda: bootstrap_interval(torch.ones(1), seeded(0)), "at least 2 values"),
        (lambda: bootstrap_interval(torch.ones(5), seeded(0), level=95), "level 95"),
        (lambda: paired_difference(torch.ones(3), torch.ones(4), seeded(0)), "3 and 4 values"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
