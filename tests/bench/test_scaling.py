"""Fits and crossovers on known curves; one block of a toy through the whole measurement."""

import pytest
import torch

import pared
from pared.bench.scaling import Block, crossover, exponent, measure


def test_exponent_of_a_power_law():
    tokens = [256, 1024, 4096]
    assert exponent(tokens, [3e-6 * t**1.7 for t in tokens]) == pytest.approx(1.7)


def test_crossover_of_two_power_laws():
    tokens = [64, 256, 1024, 4096]
    quadratic = [t**2 for t in tokens]
    linear = [600 * t for t in tokens]
    assert crossover(tokens, quadratic, linear) == pytest.approx(600, rel=1e-6)
    assert crossover(tokens, linear, quadratic) is None
    assert crossover(tokens, quadratic, [0.1 * q for q in quadratic]) == 64


def test_the_bare_block_computes_what_it_computes_inside_the_model():
    block = Block("toy:pixart", [pared.EDiT()], torch.float32)
    inside = []
    block.family.blocks[0].module.register_forward_hook(lambda m, a, output: inside.append(output))
    call, tokens = block.call_at(16 * block.scale)
    block.call_at(8 * block.scale)  # another size must not disturb the first
    alone = call()
    torch.testing.assert_close(alone, inside[0], rtol=0, atol=0)
    assert tokens == alone.shape[1]


def test_measure_reports_every_arm_at_every_size():
    sizes = [8 * 8, 16 * 8]
    points = measure("toy:pixart", {"softmax": [], "edit": [pared.EDiT()]}, sizes, rounds=2)
    assert [p.pixels for p in points] == sizes
    assert points[1].tokens == 4 * points[0].tokens
    assert all(p.timings["edit"].median > 0 for p in points)
