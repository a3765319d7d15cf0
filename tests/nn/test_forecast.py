"""Forecasts by finite differences: the series, what they're exact for, types and memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.nn.forecast import Forecaster, changed, changes


def history_of(forecaster, steps, value):
    """Of the values of a function at some steps."""
    history = None
    for step in steps:
        history = forecaster.updated(history, step, (value(step),))
    return history


def polynomial(*coefficients):
    return lambda s: torch.tensor(
        [sum(c * s**i for i, c in enumerate(coefficients))], dtype=torch.float64
    )


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_papers_series_at_a_uniform_gap(order):
    """F(s + k) = F + sum_i nabla^i F k^i / (i! N^i)."""
    every, last = 4, 20
    history = history_of(Forecaster(order), range(0, last + 1, every), math_sin)
    nabla = [math_sin(last - every * i) for i in range(order + 1)]
    for k in (1, 2, 3):
        wanted = sum(
            sum((-1) ** j * math.comb(i, j) * nabla[j] for j in range(i + 1))
            * k**i
            / (math.factorial(i) * every**i)
            for i in range(order + 1)
        )
        (found,) = Forecaster(order).forecast(history, last + k)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_newtons_series_at_a_uniform_gap(order):
    """sum_i binom(k / N + i - 1, i) nabla^i y."""
    every, last = 4, 20
    newton = Forecaster(order, "newton")
    history = history_of(newton, range(0, last + 1, every), math_sin)
    nabla = [math_sin(last - every * i) for i in range(order + 1)]
    for k in (1, 2, 3):
        wanted = 0
        for i in range(order + 1):
            binomial = math.prod((k / every + j) / (j + 1) for j in range(i))
            wanted += binomial * sum((-1) ** j * math.comb(i, j) * nabla[j] for j in range(i + 1))
        (found,) = newton.forecast(history, last + k)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


def math_sin(step):
    return torch.tensor([math.sin(step / 7)], dtype=torch.float64)


@given(
    steps=st.sets(st.integers(0, 40), min_size=4, max_size=8),
    coefficients=st.lists(st.floats(-2, 2), min_size=1, max_size=4),
    ahead=st.integers(1, 5),
)
@settings(max_examples=50, deadline=None)
def test_newton_is_exact_for_polynomials_whatever_the_gaps(steps, coefficients, ahead):
    value = polynomial(*coefficients)
    order, steps = len(coefficients) - 1, sorted(steps)
    newton = Forecaster(order, "newton")
    (found,) = newton.forecast(history_of(newton, steps, value), steps[-1] + ahead)
    torch.testing.assert_close(found, value(steps[-1] + ahead), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("predictor", ["taylor", "newton"])
def test_a_step_that_comes_twice_keeps_the_differences_and_takes_the_later_value(predictor):
    seer = Forecaster(1, predictor)
    history = history_of(seer, (-900.0, -700.0), polynomial(3, 2))
    later = polynomial(3, 2)(-700.0) + 5
    history = seer.updated(history, -700.0, (later,))
    assert history.steps == (-700.0, -900.0)
    torch.testing.assert_close(seer.forecast(history, -700.0)[0], later)
    torch.testing.assert_close(seer.forecast(history, -650.0)[0], later + 2 * 50)


def test_taylor_is_exact_for_lines_and_off_by_a_n_k_for_squares():
    line = history_of(Forecaster(3), (0, 1, 2, 6, 10), polynomial(5, -3))
    torch.testing.assert_close(Forecaster(3).forecast(line, 13)[0], polynomial(5, -3)(13))
    for order in (2, 3):
        square = history_of(Forecaster(order), (0, 4, 8, 12), polynomial(0, 0, 0.5))
        (found,) = Forecaster(order).forecast(square, 15)
        torch.testing.assert_close(found, polynomial(-0.5 * 4 * 3, 0, 0.5)(15))


def test_factors_grow_with_the_computed_steps():
    history, seer = None, Forecaster(2)
    for number, step in enumerate((0, 1, 5, 9), 1):
        history = seer.updated(history, step, (torch.ones(3),))
        assert len(history.factors[0]) == len(history.steps) == min(number, 3)
    assert history.steps == (9, 5, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_order_0_gives_the_value_back_bit_for_bit(dtype):
    value = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    (found,) = Forecaster().forecast(Forecaster().updated(None, 3, (value,)), 5)
    assert found.dtype == dtype and torch.equal(found, value)


def test_differences_of_half_precision_values_are_taken_in_float32():
    """Values near 100 that grow by 1/3 a step: in bfloat16 a third of them would be lost."""
    seer, history = Forecaster(1, dtype="float32"), None
    values = [torch.full((1,), 100 + step).bfloat16() for step in (0, 3)]
    for step, value in zip((0, 3), values, strict=True):
        history = seer.updated(history, 3 * step, (value,))
    assert history.factors[0][1].item() == pytest.approx(1 / 3, rel=1e-6)
    (found,) = seer.forecast(history, 12)
    assert found.dtype == torch.bfloat16 and found.item() == 104


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
def test_factors_are_stored_in_the_type_asked_for(stored):
    seer = Forecaster(1, dtype=stored)
    history = history_of(seer, (0, 1), lambda s: torch.full((4,), s / 8))
    assert {f.dtype for f in history.factors[0]} == {getattr(torch, stored)}
    (found,) = seer.forecast(history, 2)
    assert found.dtype == torch.float32 and (found == 0.25).all()


def test_factors_are_fresh_tensors_without_a_graph():
    whole = torch.randn(4, 100, requires_grad=True)
    history = Forecaster(1).updated(None, 0, (whole[:, :5],))
    (factor,) = history.factors[0]
    assert not factor.requires_grad and factor.untyped_storage().nbytes() == 4 * 5 * 4
    before = factor.clone()
    whole.detach().zero_()
    assert torch.equal(factor, before)


def test_streams_that_are_missing_stay_missing():
    seer, some = Forecaster(1), torch.ones(2)
    history = seer.updated(None, 0, (some, None))
    history = seer.updated(history, 1, (3 * some, some))
    image, text = seer.forecast(history, 2)
    assert (image == 5).all() and (text == 1).all()  # the text has no difference yet
    assert seer.forecast(seer.updated(history, 2, (some, None)), 3)[1] is None


def test_half_precision_does_not_overflow():
    seer = Forecaster(1)
    values = {0: torch.tensor([0.0, 1.0]).half(), 1: torch.tensor([60000.0, 2.0]).half()}
    (found,) = seer.forecast(history_of(seer, (0, 1), values.get), 5)
    assert found.tolist() == [65504, 6]
    (found,) = changed((values[1],), (torch.tensor([60000.0, 1.0]),))
    assert found.tolist() == [65504, 3]


# Residual streams -------------------------------------------------------------------------------


def streams(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (torch.randn(2, n, 8, generator=generator) * 10 ** (3 * n / 5)).to(dtype) for n in (5, 3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_in_float64_gives_back_the_very_tensor(dtype):
    before, after = streams(0, dtype), streams(1, dtype)
    change = changes(before, after, torch.float64)
    assert {c.dtype for c in change} == {torch.float64}
    again = changed(before, change)
    assert all(torch.equal(x, y) for x, y in zip(again, after, strict=True))


def test_a_change_in_float32_gives_it_back_to_rounding():
    before, after = streams(0), streams(1)
    for x, y, z in zip(changed(before, changes(before, after)), after, before, strict=True):
        assert (x - y).abs().max() <= 2e-7 * max(y.abs().max(), z.abs().max())


def test_a_stream_that_ends_goes_through_unchanged():
    image, text = streams(0)
    change = changes((text, image), (None, 2 * image))
    assert change[0] is None
    found = changed((text, image), change)
    assert found[0] is text and torch.allclose(found[1], 2 * image)
