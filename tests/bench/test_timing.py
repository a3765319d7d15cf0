"""Order of calls, arithmetic and verdicts, on a clock that only the calls move."""

from contextlib import contextmanager

import pytest
import torch

from pared.bench import host, timing
from pared.bench.timing import drift, interleave, peak_memory, summarize
from pared.errors import InputError


class World:
    """A clock, and calls that take as long as they are told to and write down their turn."""

    def __init__(self):
        self.now = 0.0
        self.turns = []

    def clock(self):
        return self.now

    def call(self, name, *durations):
        """A call whose n-th run takes the n-th duration; the last one holds for all after."""
        left = list(durations)

        def run():
            self.turns.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


class Quiet:
    """Neighbours that keep a given number of cores busy."""

    def __init__(self, busy=0.0):
        self.busy = busy

    def cores(self):
        return self.busy


@pytest.fixture
def world():
    return World()


def measure(world, calls, busy=0.0, **options):
    return interleave(calls, clock=world.clock, neighbours=lambda: Quiet(busy), **options)


def test_base_opens_every_round_and_closes_the_run(world):
    calls = {name: world.call(name, 1.0) for name in ("a", "base", "b")}
    measure(world, calls, rounds=2, warmup=1)
    assert world.turns == ["base", "a", "b"] * 3 + ["base"]


def test_warmup_does_not_count(world):
    calls = {"base": world.call("base", 100, 2.0), "a": world.call("a", 100, 1.0)}
    timings = measure(world, calls, rounds=3, warmup=1)
    assert timings["base"].samples == (2.0,) * 4
    assert timings["a"].samples == (1.0,) * 3
    assert timings["a"].ratio == 2.0


def test_timings_keep_the_order_given(world):
    calls = {name: world.call(name, 1.0) for name in ("a", "base", "b")}
    assert list(measure(world, calls, rounds=1, warmup=0)) == ["a", "base", "b"]


def test_ratios_are_taken_within_a_round(world):
    # The machine gets slower all the while, and base is twice as slow as `a` throughout.
    calls = {"base": world.call("base", 2, 4, 8, 16), "a": world.call("a", 1, 2, 4)}
    timings = measure(world, calls, rounds=3, warmup=0)
    a = timings["a"]
    assert (a.ratio, a.ratio_low, a.ratio_high) == (2.0, 2.0, 2.0)
    assert timings["base"].ratio == 1.0


def test_percentiles_interpolate():
    ten = [float(i) for i in range(11)]
    summed = summarize(ten, [2 * each for each in ten[:1]] + [2.0] * 10)
    assert (summed.p10, summed.median, summed.p90) == pytest.approx((1, 5, 9))
    ratios = summarize([1.0] * 11, ten)
    assert (ratios.ratio_low, ratios.ratio, ratios.ratio_high) == pytest.approx((1, 5, 9))


def test_drift_compares_the_thirds():
    assert drift([1, 1, 1, 5, 5, 5, 2, 2, 2]) == pytest.approx(1.0)
    assert drift([2.0, 1.0]) == pytest.approx(-0.5)
    assert drift([1, 9, 1, 7, 7, 7, 1, 9, 1]) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("last", "word"), [(1.04, None), (0.96, None), (1.2, "slower"), (0.8, "faster")]
)
def test_verdict_on_a_base_that_moves(world, last, word):
    calls = {"base": world.call("base", 1, 1, 1, last)}
    verdict = measure(world, calls, rounds=5, warmup=0).verdict
    assert verdict.drift == pytest.approx(last - 1)
    assert verdict.sound == (word is None)
    if word:
        assert f"20% {word}" in verdict.notes[0]


def test_verdict_on_a_busy_machine(world, monkeypatch):
    monkeypatch.setattr(host, "usable_cores", lambda: 2)
    calls = {"base": world.call("base", 1.0)}
    assert measure(world, calls, busy=0.4).verdict.notes == ()
    verdict = measure(world, calls, busy=1.0).verdict
    assert "The machine was busy: other programs kept 1.0 of 2 cores" in verdict.notes[0]


def test_verdict_records_the_conditions(world):
    verdict = measure(world, {"base": world.call("base", 1.0)}, busy=0.1).verdict
    assert verdict.threads == torch.get_num_threads()
    assert verdict.cores == host.usable_cores()
    assert verdict.busy_elsewhere == 0.1


def test_progress_is_told_of_every_call(world):
    told = []
    calls = {"base": world.call("base", 1.0), "a": world.call("a", 1.0)}
    measure(world, calls, rounds=2, warmup=1, progress=lambda *at: told.append(at))
    assert told == [(done, 7) for done in range(1, 8)]


def test_progress_is_not_timed(world):
    def slow(done, total):
        world.now += 1000

    calls = {"base": world.call("base", 1.0)}
    assert measure(world, calls, rounds=2, warmup=0, progress=slow)["base"].p90 == 1.0


def test_accelerator_is_waited_for_inside_the_measured_time(world, monkeypatch):
    pending = [0.0]

    def launch():
        pending[0] += 3.0

    def wait():
        world.now += pending[0]
        pending[0] = 0.0

    monkeypatch.setattr(timing, "synchronize", wait)
    assert measure(world, {"base": launch}, rounds=2, warmup=1)["base"].samples == (3.0,) * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "other"}, '"other" is not among the calls; name one of base'),
        ({"rounds": 0}, "0 rounds"),
        ({"warmup": -1}, "after -1 of warm-up"),
    ],
)
def test_says_what_is_wrong(world, options, message):
    with pytest.raises(InputError, match=message):
        measure(world, {"base": world.call("base", 1.0)}, **options)
    assert world.turns == []


# Memory


def test_peak_is_the_growth_while_the_call_runs():
    held = [100]

    def call():
        held[0] = 150

    assert peak_memory(call, read=lambda: held[0]) == 50


def test_a_call_that_frees_more_than_it_takes_needs_nothing():
    held = [100]

    def call():
        held[0] = 60

    assert peak_memory(call, read=lambda: held[0]) == 0


def test_a_failing_call_fails_and_stops_the_sampler():
    def call():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        peak_memory(call)


def test_peak_memory_sees_a_real_tensor():
    size = 2**26
    peak = peak_memory(lambda: torch.ones(size, dtype=torch.uint8))
    # Below: pages that the allocator had left; above: what else the process does meanwhile.
    assert 0.8 * size < peak < 2 * size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_on_cuda_is_exact():
    size = 2**26

    def call():
        first = torch.ones(size, dtype=torch.uint8, device="cuda")
        return first + 1

    assert peak_memory(call, "cuda") == 2 * size


def test_entering_and_leaving_a_context_is_not_timed(world):
    @contextmanager
    def around():
        world.now += 10
        yield
        world.now += 10

    calls = {"base": world.call("base", 2.0), "a": world.call("a", 1.0)}
    timings = measure(world, calls, rounds=2, warmup=0, around={"a": around})
    assert timings["a"].samples == (1.0,) * 2
    assert timings["base"].samples == (2.0,) * 3
