"""The grid of the running call: threads have their own, copies too."""

import copy
import pickle
import threading

import pytest
import torch

import pared
from pared import anatomy
from pared.anatomy import presets

SIZES = ({"height": 8, "width": 8}, {"height": 8, "width": 12})


@torch.no_grad()
def sample(model, size, seed, steps=4):
    family = anatomy.of(model)
    latents, timestep, condition = family.example(
        1, **size, text_tokens=4, generator=torch.Generator().manual_seed(seed)
    )
    for step in range(steps):
        now = torch.full_like(timestep, 900 - 200 * step)
        latents = latents - 0.1 * family.denoise(model, latents, now, condition)
    return latents


def in_threads(work):
    """Both calls of `work` at a time, each in a thread of its own."""
    found = {}

    def note(index):
        found[index] = work(index)

    threads = [threading.Thread(target=note, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[index] for index in (0, 1)]


def meet(barrier):
    """Wait for the other thread, and leave a call's arguments as they are."""
    barrier.wait()


def test_threads_at_two_sizes_reuse_each_in_its_own_grid():
    """Within every call both wait for each other, when the grids of both have been measured."""
    model = presets.build("toy:flux", device="cpu")
    method = pared.parse("ras:start=1,resets=[3],steps=4")
    with pared.apply(model, method):
        wanted = [sample(model, size, seed) for seed, size in enumerate(SIZES)]
        together = threading.Barrier(2, timeout=30)
        hook = model.time_text_embed.register_forward_pre_hook(lambda *_: meet(together))
        found = in_threads(lambda index: sample(model, SIZES[index], index))
        hook.remove()
    for some, other in zip(found, wanted, strict=True):
        assert torch.equal(some, other)


@pytest.mark.parametrize("toy", ["pixart", "flux", "wan", "unet"])
def test_threads_measure_apart(toy):
    model = presets.build(f"toy:{toy}", device="cpu")
    family = anatomy.of(model)
    (site, *_) = family.sites("self_attention", "joint_attention")
    grid = family.grid(site)
    assert grid.tokens == 0 or toy == "wan"
    together = threading.Barrier(2, timeout=30)

    def tokens(index):
        size = family.sizes[index]
        with torch.no_grad():
            family.denoise(model, *family.example(1, **size))
        together.wait()
        return grid.height, grid.width, grid.tokens

    (height, width, few), (same, wider, more) = in_threads(tokens)
    assert (height, width) != (same, wider) and (0 < few < more or toy == "wan")
    # A thread that never called the model sees what was measured last: that of one of the two.
    assert (grid.height, grid.width) in ((height, width), (same, wider))


def test_copies_measure_for_themselves():
    model = presets.build("toy:pixart", device="cpu")
    family = anatomy.of(model)
    grid = family.grid(family.sites("self_attention")[0])
    sample(model, SIZES[0], 0, steps=1)
    for twin in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))):
        assert (twin.height, twin.width) == (grid.height, grid.width)
        twin.height = 99
        assert grid.height != 99
    twin = copy.deepcopy(model)
    (measured,) = (h for h in twin._forward_pre_hooks.values() if isinstance(h, anatomy.Grid))
    sample(twin, SIZES[1], 0, steps=1)
    assert measured is not grid and measured.width > grid.width
