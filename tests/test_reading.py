"""What is read from a call: its place in a schedule, once for all methods, and without waiting."""

from contextlib import ExitStack

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.reading import Schedule
from pared.runtime import Clock
from tests.caching.pipelines import WAYS


def schedule(numbers, toy="pixart"):
    return Schedule(torch.tensor(numbers), anatomy.of(presets.build(f"toy:{toy}")))


# Schedules --------------------------------------------------------------------------------------


def test_an_entry_is_known_by_its_place_in_memory():
    known = schedule([900, 500, 500, 100])
    entries = [*known.timesteps]
    assert [known.place(t) for t in entries] == [0, 1, 2, 3]
    assert [known.place(t.expand(2)) for t in entries] == [0, 1, 2, 3]
    assert [known.place(t[None]) for t in known.timesteps[2:]] == [2, 3]
    others = [torch.tensor(500), entries[1].clone(), known.timesteps.clone()[1], torch.ones(2)]
    others += [known.timesteps[1:3], entries[1].float(), entries[1].repeat(2)]
    assert [known.place(t) for t in others] == [None] * 7
    # A part of a larger schedule, or every second of its entries.
    whole = torch.arange(10, 0, -1)
    part = Schedule(whole[2:9:2], known._family)
    assert [part.place(t) for t in whole] == [None, None, 0, None, 1, None, 2, None, 3, None]


def test_an_entry_of_a_schedule_of_another_length_rivals():
    known = schedule([900, 500, 100])
    assert not any(known.rivals(t) for t in (*known.timesteps, *known.timesteps.clone()))
    assert not known.rivals(torch.tensor(500)) and not known.rivals(torch.tensor([500, 500]))
    assert all(known.rivals(t.expand(2)) for t in torch.tensor([900, 500]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("toy", ["pixart", "flux", "lumina"])
def test_what_a_pipeline_tells_fits_its_entry(toy, dtype):
    times = [1000.0, 930.5, 814.25, 507.0, 250.0, 12.5]
    known = schedule(times, toy)
    sign = -1 if known._family.rising else 1
    for place, time in enumerate(times):
        told = known._family.told(torch.tensor(time).to(dtype))
        # As a device may round it that multiplies by the inverse.
        told = float(sign * told) * (1 + torch.finfo(dtype).eps / 2)
        assert known.nearest(told, dtype, None) == place and known.fits(place, told, dtype)
        if place:
            assert not known.fits(place - 1, told, dtype)
    between = float(sign * known._family.told(torch.tensor(650.0)))
    assert known.nearest(between, dtype, None) is None
    assert not known.fits(len(known), told, dtype)


def test_where_rounding_makes_entries_equal_the_likely_one_is_taken():
    known = schedule([1000.0, 999.0, 998.0, 900.0], "flux")
    assert known.nearest(1.0, torch.bfloat16, 2) == 2
    assert known.nearest(1.0, torch.bfloat16, 3) == 0
    assert known.repeats(torch.bfloat16) and not known.repeats(torch.float32)


# Waiting for a device ---------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers read, and tensors compared."""

    def __init__(self):
        super().__init__()
        self.counts = {"read": 0, "compared": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.counts["read"] += 1
        if function is torch.ops.aten.equal.default:
            self.counts["compared"] += 1
        return function(*args, **(kwargs or {}))


def attached(pipe, count):
    undo = ExitStack()
    return undo, [Clock(pipe, undo, leads=number == 1) for number in range(count)]


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize(
    ("name", "read"), [("pixart-sigma", 0), ("sd3.5", 0), ("flux", 1), ("flux, guided in turn", 2)]
)
def test_a_call_is_waited_for_once_if_at_all(name, read, steps):
    """What a pipeline's run waits for with three methods on it and without."""
    way = next(way for way in WAYS if way.name == name)
    pipe = way.build()
    counts = []
    for methods in (0, 3):
        undo, _ = attached(pipe, methods)
        with Waits() as waits:
            way.paint(pipe, steps)
        counts.append(waits.counts)
        undo.close()
    plain, watched = counts
    assert watched["read"] - plain["read"] == read * steps
    assert watched["compared"] == plain["compared"]


@torch.no_grad()
def test_all_clocks_read_the_same_whichever_comes_first():
    model = presets.build("toy:pixart", device="cpu")
    family, undo = anatomy.of(model), ExitStack()
    clocks = [Clock(model, undo) for _ in range(2)]
    clocks.append(Clock(model, undo, leads=True))
    example = family.example(1, 8, 8, text_tokens=4)
    family.denoise(model, *example)
    readings = [clock.reading for clock in clocks]
    assert readings[0] is readings[1] is readings[2]
    assert clocks[0]._clocks() == [clocks[2], clocks[0], clocks[1]]
    undo.close()
    # The next to come reads for itself.
    with ExitStack() as other:
        clock = Clock(model, other)
        family.denoise(model, *example)
        assert clock.reading is not readings[0]


@torch.no_grad()
def test_a_timestep_written_into_in_place_is_read_anew():
    """As those who capture graphs of a device do it; no schedule says what it is."""
    model = presets.build("toy:pixart", device="cpu")
    family = anatomy.of(model)
    latents, _, condition = family.example(1, 8, 8, text_tokens=4)
    times, buffer = [], torch.zeros(3)
    with ExitStack() as undo:
        clock = Clock(model, undo)
        clock.on_call = lambda: times.append((clock.reading.time, clock.step))
        for time in (900.0, 500.0, 100.0):
            buffer.fill_(time)
            model(
                latents,
                condition["text"],
                timestep=buffer[1].expand(1),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            )
    assert times == [(900.0, 0), (500.0, 1), (100.0, 2)]


@pytest.mark.gpu
def test_nothing_is_waited_for_on_a_device():
    model = presets.build("toy:sd3", device="cuda")
    family = anatomy.of(model)
    latents, _, condition = family.example(1, 8, 8, text_tokens=4)
    pipe = next(way for way in WAYS if way.name == "sd3.5").build()
    pipe.transformer = model
    pipe.scheduler.set_timesteps(5, device="cuda")
    with pared.apply(pipe, pared.parse("taylorseer:interval=2,warmup=1")) as handle:
        for number, time in enumerate(pipe.scheduler.timesteps):
            torch.cuda.set_sync_debug_mode("error" if number else "default")
            try:
                family.denoise(model, latents, time.expand(1), condition)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert handle.stats["taylorseer"]["forecast"] > 0


def test_schedulers_show_their_timesteps_as_one_tensor():
    """What places in memory rest on, of every scheduler that the house's pipelines come with."""
    for way in {way.scheduler for way in WAYS}:
        scheduler = way()
        if scheduler.config.get("use_dynamic_shifting"):
            continue
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.ndim == 1 and len(scheduler.timesteps) >= 4
    assert isinstance(diffusers.DDPMScheduler().timesteps, torch.Tensor)
