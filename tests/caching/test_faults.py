"""Calls of stock pipelines that go wrong: the next one equals a fresh one, with every method.

The contract has the same for bare denoisers. By default every method goes through it on one
pipeline, and on one whose guidance calls in turn.
"""

import functools
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import pared
from pared.bench.contract_runtime import spared
from pared.method import denoiser
from tests.caching.pipelines import FIRST, STEPS, WAYS, Way, serving

# What callbacks get at, by way: the tensors of prompt and negative prompt on a joint batch, or
# guidance alone, where it calls in turn. Elsewhere they get at neither.
JOINT = {
    "sd": ("prompt_embeds",),
    "sdxl": ("prompt_embeds", "add_text_embeds", "add_time_ids"),
    "sd3.5": ("prompt_embeds", "pooled_prompt_embeds"),
}
IN_TURN = [way.name for way in WAYS if way.family == "wan" and way.passes == 2]
HALF = STEPS // 2


# Faults: calls of a pipeline, of `Way.paint` ------------------------------------------------------


@contextmanager
def on_calls_inside(pipe, hook):
    """Within it, a hook hears of every call of a module of the denoiser."""
    modules = set(denoiser(pipe).modules())
    handle = register_module_forward_pre_hook(lambda m, args: hook() if m in modules else None)
    try:
        yield
    finally:
        handle.remove()


def stopped_inside(way, pipe, error, share):
    """A call that breaks off inside of the denoiser, at a share of the calls of its modules."""
    calls = []
    with on_calls_inside(pipe, lambda: calls.append(1)):
        way.paint(pipe)
    left = int(share * len(calls))

    def strike():
        nonlocal left
        left -= 1
        if left < 0:
            raise error

    with pytest.raises(error), on_calls_inside(pipe, strike):
        way.paint(pipe)


def stopped_between(way, pipe):
    """A call that Ctrl-C breaks off between two calls of the denoiser."""
    own, left = pipe.scheduler.step, HALF

    @functools.wraps(own)  # pipelines look at the arguments it takes
    def step(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    pipe.scheduler.step = step
    try:
        with pytest.raises(KeyboardInterrupt):
            way.paint(pipe)
    finally:
        del pipe.scheduler.step


def unguided(way, pipe):
    """A call whose guidance a callback ends halfway, as the documentation of diffusers shows it."""
    names = JOINT.get(way.name, ())

    def end(pipe, step, timestep, tensors):
        if step != HALF:
            return {}
        pipe._guidance_scale = 0.0
        return {name: tensors[name].chunk(2)[-1] for name in names}

    return called_back(way, pipe, end, names)


def left_alone(way, pipe):
    """A call in which halfway a callback drops the second of two pictures."""
    names = ("latents", *JOINT[way.name])

    def leave(pipe, step, timestep, tensors):
        # Of a joint batch, both pictures without the prompt come first, then both with it.
        return {n: x[::2] for n, x in tensors.items()} if step == HALF else {}

    return called_back(way, pipe, leave, names, pictures=2)


def called_back(way, pipe, callback, names, **call):
    given = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [*names]}
    return way.paint(pipe, **given, **call)


def faults(way):
    """The calls that may leave something behind, by name; those that get through give pictures."""
    found = {
        "an error in the denoiser": partial(stopped_inside, error=ZeroDivisionError, share=0.4),
        "Ctrl-C in the denoiser": partial(stopped_inside, error=KeyboardInterrupt, share=0.9),
        "Ctrl-C between two calls": stopped_between,
        "a larger batch": partial(Way.paint, pictures=2),
    }
    if way.name in (*JOINT, *IN_TURN):
        found["guidance that ends halfway"] = unguided
    if way.name in JOINT:
        found["a batch that shrinks halfway"] = left_alone
    return found


# The next call ------------------------------------------------------------------------------------


def cases():
    seen = set()
    for way in sorted(WAYS, key=lambda way: (way not in FIRST, way.name not in IN_TURN)):
        for spec in serving(way):
            quick = spec not in seen or way.name == IN_TURN[0]
            seen.add(spec)
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(spec, way, id=f"{spec}-{way.name}", marks=marks)


@pytest.mark.filterwarnings("ignore:ras is validated for Euler")
@pytest.mark.parametrize("spec, way", cases())
def test_a_call_after_a_fault_equals_a_fresh_one(spec, way):
    pipe, method = way.build(), pared.parse(spec)
    plain, calls = way.paint(pipe), faults(way)

    def fresh(call):
        with pared.apply(pipe, method) as handle:
            found = call(pipe=pipe)
        assert spared(handle.stats[method.info.slug]) > 0
        return found

    wanted = fresh(way.paint)
    right = {name: fresh(partial(call, way)) for name, call in calls.items()}
    with pared.apply(pipe, method):
        for name, call in calls.items():
            found = call(way, pipe)
            if found is not None:
                assert torch.equal(found, right[name]), f"a call with {name} depends on another"
            assert torch.equal(way.paint(pipe), wanted), f"a call depends on {name}"
    assert torch.equal(way.paint(pipe), plain), "something stays behind"


@pytest.mark.parametrize("name", (*JOINT, *IN_TURN))
def test_callbacks_end_guidance_and_pictures(name):
    """The faults do what they're named for."""
    way = next(way for way in WAYS if way.name == name)
    pipe, sizes = way.build(), []
    denoiser(pipe).register_forward_pre_hook(
        lambda module, args, given: sizes.append(len((*args, *given.values())[0])), with_kwargs=True
    )
    unguided(way, pipe)
    rounds = pipe.num_timesteps
    full, rest = HALF + 1, rounds - HALF - 1
    if name in IN_TURN:
        assert sizes == [1] * (2 * full + rest)
        return
    assert sizes == [2] * full + [1] * rest
    sizes.clear()
    left_alone(way, pipe)
    assert sizes == [4] * full + [2] * rest
