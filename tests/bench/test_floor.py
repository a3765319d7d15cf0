"""Arithmetic of the floor on a false clock; the real rates only in small."""

import itertools
import json

import pytest
import torch

from pared.bench import floor as floor_module
from pared.bench.floor import (
    Floor,
    affordable_size,
    best_seconds,
    copy_rate,
    floor,
    gemm_rate,
    machine,
)
from pared.errors import InputError


@pytest.fixture
def small(monkeypatch):
    """Sizes that measure nothing worth knowing, quickly."""
    monkeypatch.setattr(floor_module, "CPU_MATRIX", 256)
    monkeypatch.setattr(floor_module, "CPU_TENSOR", 2**16)
    floor_module._measure.cache_clear()
    yield
    floor_module._measure.cache_clear()


def ticking(step):
    """A clock that moves by `step` seconds each time it is read."""
    return itertools.count(0, step).__next__


def test_floor_is_the_slower_of_arithmetic_and_memory():
    rates = Floor("cpu", 1, {"float32": 100.0, "bfloat16": 400.0}, 10.0)
    assert rates.seconds(flops=1000, bytes=50) == 10
    assert rates.seconds(flops=1000, bytes=50, dtype=torch.bfloat16) == 5
    assert rates.seconds(flops=1000, bytes=10, dtype=torch.bfloat16) == 2.5


def test_a_format_without_a_rate_is_refused():
    rates = Floor("cpu", 1, {"float32": 1.0, "bfloat16": 1.0}, 1.0)
    with pytest.raises(InputError, match="float16 on cpu; take one of float32, bfloat16"):
        rates.seconds(1, 1, torch.float16)


def test_best_is_the_shortest_after_a_run_that_does_not_count():
    runs = []
    times = iter([0, 9, 10, 14, 20, 23, 30, 38, 40, 45])
    assert best_seconds(lambda: runs.append(1), clock=lambda: next(times)) == 3
    assert len(runs) == 6


def test_slow_machines_multiply_smaller_matrices():
    probe = floor_module.PROBE_SIZE
    assert affordable_size(1 / 8**3, largest=8 * probe) == 8 * probe
    assert affordable_size(1.01 / 8**3, largest=8 * probe) == 4 * probe
    assert affordable_size(1000, largest=8 * probe) == probe


def test_rates_count_two_operations_and_both_ways(small):
    clock = ticking(0.5)
    assert gemm_rate(torch.float32, clock=clock) == 2 * 256**3 / 0.5
    assert copy_rate(clock=clock) == 2 * 2**16 / 0.5


def test_measuring_leaves_random_numbers_alone(small):
    before = torch.get_rng_state()
    floor()
    assert torch.equal(torch.get_rng_state(), before)


def test_floor_is_measured_once(small):
    assert floor("cpu") is floor(torch.device("cpu"))


def test_machine_is_json_with_everything_a_result_must_say(small):
    described = json.loads(json.dumps(machine()))
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["cpu"] and described["cores"] >= 1
    assert set(described["flops_per_second"]) == {"float32", "bfloat16"}
    assert described["bytes_per_second"] > 0
    assert (described["gpu"] is None) == (not torch.cuda.is_available())


@pytest.mark.slow
def test_real_rates_are_those_of_a_computer():
    rates = floor()
    # From a weak core to more than any processor of today.
    assert 1e8 < rates.flops_per_second["float32"] < 1e14
    assert 1e8 < rates.bytes_per_second < 1e13
