"""The clock of a run: steps, calls and memory, read from calls of real pipelines and denoisers."""

import copy
import inspect
import threading
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    PixArtSigmaPipeline,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import nn
from torch.utils._pytree import tree_map_only

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.keeping import held_bytes
from pared.method import attached_to
from pared.runtime import Clock
from pared.upscaling import image_to_image
from tests.caching.pipelines import WAYS
from tests.recipes.pipelines import pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixart(scheduler=None, transformer=None):
    model = transformer or presets.build("toy:pixart", device="cpu")
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe = PixArtSigmaPipeline(**parts, transformer=model, scheduler=scheduler or DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, steps=4, seed=0, pictures=1, guidance=2.0, **call):
    """Latents from a pipeline that encodes nothing: its prompts come as embeddings."""
    text = torch.randn(pictures, 4, 64, generator=seeded(7))
    prompts = {"prompt": None, "negative_prompt": None, "prompt_embeds": text}
    prompts["negative_prompt_embeds"] = torch.zeros_like(text)
    prompts["prompt_attention_mask"] = torch.ones(pictures, 4)
    prompts["negative_prompt_attention_mask"] = torch.ones(pictures, 4)
    return pipe(
        **prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[seeded(seed + number) for number in range(pictures)],
        height=64,
        width=64,
        use_resolution_binning=False,
        output_type="latent",
        **call,
    ).images


class Follower:
    """A clock whose every reading is written down, as (step, call)."""

    def __init__(self, target, **settings):
        self.undo = ExitStack()
        self.clock = Clock(target, self.undo, **settings)
        self.clock.on_call = self.write
        self.runs, self.told = [], []

    def write(self):
        clock = self.clock
        if clock.stats["runs"] > len(self.runs):
            self.runs.append([])
            self.told.append([])
        self.steps = clock.steps
        self.told[-1].append(clock.steps)
        # What a context keeps is of its own run, call and past: it tells what the clock mixes up.
        past = clock.kept.setdefault("past", [])
        assert all(entry[0] == len(self.runs) and entry[2] == clock.call for entry in past)
        past.append((len(self.runs), clock.step, clock.call))
        self.runs[-1].append((clock.step, clock.call))


def singles(steps):
    return [(step, 0) for step in range(steps)]


# Pipelines --------------------------------------------------------------------------------------


def test_guidance_on_a_joint_batch_is_one_call_a_step():
    pipe = pixart()
    seen = Follower(pipe)
    for steps in (4, 4, 2, 6):
        paint(pipe, steps)
        assert seen.steps == steps
    assert seen.runs == [singles(4), singles(4), singles(2), singles(6)]
    assert seen.clock.stats["runs"] == 4 and seen.clock.stats["calls"] == 16


def test_guidance_in_turn_is_two_calls_a_step():
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=presets.build("toy:flux", device="cpu"),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    pipe.set_progress_bar_config(disable=True)
    seen = Follower(pipe)
    text, pooled = torch.randn(1, 4, 64), torch.randn(1, 32)
    for steps in (3, 3, 1, 1):
        pipe(
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=torch.zeros_like(text),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled),
            true_cfg_scale=2.0,
            num_inference_steps=steps,
            height=64,
            width=64,
            output_type="latent",
        )
        assert seen.steps == steps
    three = [(step, call) for step in range(3) for call in range(2)]
    assert seen.runs == [three, three, three[:2], three[:2]]


def test_skip_layer_guidance_has_a_context_of_its_own():
    pipe = StableDiffusion3Pipeline(
        transformer=presets.build("toy:sd3", device="cpu"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    seen = Follower(pipe)
    text, pooled = torch.randn(1, 4, 64), torch.randn(1, 64)
    pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=torch.zeros_like(text),
        negative_pooled_prompt_embeds=torch.zeros_like(pooled),
        skip_guidance_layers=[1],
        skip_layer_guidance_start=0.1,
        skip_layer_guidance_stop=0.7,
        num_inference_steps=5,
        height=64,
        width=64,
        output_type="latent",
    )
    assert seen.runs == [[(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0)]]


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler])
def test_schedules_that_repeat_timesteps(scheduler):
    settings = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    settings["steps_offset"] = 1  # the pipeline warns of any other
    parts = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = StableDiffusionPipeline(
        unet=presets.build("toy:unet", device="cpu"),
        scheduler=scheduler(**settings),
        **dict.fromkeys(parts),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    seen = Follower(pipe)
    rounds = {HeunDiscreteScheduler: 7, PNDMScheduler: 5}[scheduler]
    for _ in range(2):
        text = torch.randn(1, 4, 32)
        pipe(
            prompt_embeds=text,
            negative_prompt_embeds=torch.zeros_like(text),
            num_inference_steps=4,
            height=64,
            width=64,
            output_type="latent",
        )
        assert seen.steps == rounds == len(pipe.scheduler.timesteps)
    assert seen.runs == [singles(rounds)] * 2


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_that_breaks_off_leaves_no_trace(after):
    """Between calls (a callback), or within one; the next run starts at or below its timestep."""
    pipe = pixart()
    seen = Follower(pipe)

    def interrupt(step, timestep, latents):
        if step == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paint(pipe, callback=interrupt)
    last = seen.runs[-1][-1]
    assert last == (after, 0)
    paint(pipe, timesteps=[200, 100])
    assert seen.runs[1:] == [singles(2)]
    hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        paint(pipe)
    hook.remove()
    paint(pipe)
    assert seen.runs[2:] == [singles(1), singles(4)]


def fail(*_):
    raise ZeroDivisionError


def test_another_batch_size_or_picture_is_another_run():
    pipe = pixart()
    seen = Follower(pipe)
    for pictures in (1, 2, 1):
        paint(pipe, 2, pictures=pictures)
    assert seen.runs == [singles(2)] * 3


def test_two_pipelines_that_share_a_denoiser():
    one = pixart()
    other = pixart(transformer=one.transformer)
    seen = Follower(one)
    for pipe in (one, other, one, other, other):
        paint(pipe, 3)
    assert seen.runs == [singles(3)] * 5


# Of pipelines that share a denoiser -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["unet", "sd3", "flux"])
def test_image_to_image_from_a_pipeline_begins_within_its_schedule(family, dtype):
    pipe = pipeline(family).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    refine = image_to_image(pipe)
    seen = Follower(pipe)
    size = {"height": 64, "width": 64}
    (image,) = pipe("cat", **size, num_inference_steps=10).images
    size = {} if family == "unet" else size
    rounds = [10]
    for steps in (10, 5):
        refine("cat", image=image, strength=0.7, num_inference_steps=steps, **size)
        rounds.append(int(steps * 0.7) if family == "unet" else steps - int(steps * 0.3))
        assert not seen.clock.kept, "something is kept behind the last step"
    pipe("cat", height=64, width=64, num_inference_steps=3)
    assert seen.runs == [singles(steps) for steps in (*rounds, 3)]
    assert seen.told == [[steps] * steps for steps in (*rounds, 3)]


def unet(scheduler, model=None):
    parts = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = StableDiffusionPipeline(
        unet=model or presets.build("toy:unet", device="cpu"),
        scheduler=scheduler,
        **dict.fromkeys(parts),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)

    def run(steps, **more):
        text = torch.randn(1, 4, 32, generator=seeded())
        pipe(
            prompt_embeds=text,
            negative_prompt_embeds=torch.zeros_like(text),
            num_inference_steps=steps,
            height=64,
            width=64,
            output_type="latent",
            **more,
        )

    return pipe, run


def test_a_pipeline_with_another_scheduler_is_followed_without_a_schedule():
    """That of the method's pipeline repeats nothing, and the other's timesteps are repeated."""
    pipe, run = unet(DDIMScheduler(steps_offset=1, clip_sample=False))
    _, other = unet(HeunDiscreteScheduler(steps_offset=1), pipe.unet)
    _, again = unet(DDIMScheduler(steps_offset=1, clip_sample=False), pipe.unet)
    seen = Follower(pipe)
    other(4)  # the pipeline itself has never run: its scheduler shows all of its training
    for first in (4, 7):  # seven entries are as many as Heun's
        run(first)
        other(4)
    again(2)  # the timesteps of two steps are among those of four
    run(4)
    again(2)
    assert seen.runs == [singles(steps) for steps in (7, 4, 7, 7, 7, 2, 4, 2)]
    told = [None, 4, None, 7, None, None, 4, None]
    assert seen.told == [[n] * len(run) for n, run in zip(told, seen.runs, strict=True)]
    assert seen.clock.order == 1


def test_rounds_are_of_two_kinds_only_where_the_schedule_says_so():
    pipe, run = unet(HeunDiscreteScheduler(steps_offset=1))
    _, other = unet(DDIMScheduler(steps_offset=1, clip_sample=False), pipe.unet)
    clock, orders = Clock(pipe, ExitStack()), []
    clock.on_call = lambda: orders.append(clock.order)
    run(2)
    other(2)
    assert orders == [2, 2, 2, 1, 1]


def test_a_schedule_that_is_not_followed_entry_by_entry_is_not_the_one_that_runs():
    """FLUX tells another number than its scheduler has; all of its runs begin at the same."""
    pipe = next(way for way in WAYS if way.name == "flux")
    one = pipe.build()
    other = FluxPipeline(**(one.components | {"scheduler": FlowMatchEulerDiscreteScheduler()}))
    other.set_progress_bar_config(disable=True)
    seen = Follower(one)
    for run, steps in ((one, 4), (other, 2), (one, 4), (other, 3)):
        pipe.paint(run, steps)
    assert seen.runs == [singles(4), singles(2), singles(4), singles(3)]
    assert seen.told == [[4] * 4, [4, None], [4] * 4, [4, None, None]]


def test_a_run_of_another_schedule_below_where_one_broke_off():
    pipe, run = unet(DDIMScheduler(steps_offset=1, clip_sample=False))
    _, other = unet(DDIMScheduler(steps_offset=1, clip_sample=False), pipe.unet)
    seen = Follower(pipe)

    def interrupt(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(5, callback_on_step_end=interrupt)
    other(2)
    assert seen.runs == [singles(1), singles(2)]


def test_a_schedule_whose_end_is_left_to_a_refiner():
    way = next(way for way in WAYS if way.name == "sdxl")
    pipe = way.build()
    seen = Follower(pipe)
    replace(way, call=way.call | {"denoising_end": 0.5}).paint(pipe, 6)
    assert not seen.clock.kept
    way.paint(pipe, 4)
    assert seen.runs == [singles(3), singles(4)]
    assert seen.told == [[3] * 3, [4] * 4]


# Of a pipeline with two denoisers ---------------------------------------------------------------


WAN = next(way for way in WAYS if way.name == "wan, guided in turn")


def wan():
    pipe = WAN.build()
    pipe.register_modules(transformer_2=presets.build("toy:wan", device="cpu"))
    pipe.register_to_config(boundary_ratio=0.7)
    return pipe


@pytest.mark.parametrize(
    "spec", ["taylorseer:interval=2,warmup=1", "delta-dit:cached=1,boundary=0.5"]
)
def test_a_run_goes_through_both_denoisers(spec):
    pipe, method = wan(), pared.parse(spec)
    slug = method.info.slug
    plain = WAN.paint(pipe, 9)
    calls = []
    for number, model in enumerate((pipe.transformer, pipe.transformer_2)):
        model.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    with pared.apply(pipe, method) as handle:
        found = WAN.paint(pipe, 9)
        stats = copy.deepcopy(handle.stats[slug])
        switch = calls.index(1) // 2
        assert 2 < switch < 7 and len(calls) == 18
        assert torch.equal(WAN.paint(pipe, 9), found)
        assert attached_to(pipe.transformer) == attached_to(pipe.transformer_2) == [method]
    assert torch.equal(WAN.paint(pipe, 9), plain) and not torch.equal(found, plain)
    assert (stats["runs"], stats["calls"]) == (1, 18)
    # Steps are counted through, and the second denoiser has nothing of the first to reuse.
    for path, parts in stats["by_site"].items():
        family = anatomy.of(pipe.transformer)
        block = next(b.index for b in family.blocks if path.startswith(b.path))
        fresh = [step for step in range(9) if step in (0, switch)]
        if slug == "taylorseer":
            skipped = [step for step in range(9) if not method.full(step) and step not in fresh]
        else:
            runs = [method.run_at(step, len(family.blocks), 9) for step in range(9)]
            odd = [step for step in range(9) if step % 2 and step not in fresh]
            skipped = [step for step in odd if block in runs[step]]
        spared = parts.get("forecast", 0) + parts.get("reused", 0)
        assert spared == 2 * len(skipped), path
        assert sum(parts.values()) == 18
    for model in (pipe.transformer, pipe.transformer_2):
        assert not attached_to(model) and not model._forward_hooks


def test_one_clock_goes_on_where_the_other_stops():
    pipe, seen, undo = wan(), [], ExitStack()
    clocks = []
    for model in pared.method.denoisers(pipe):
        clock = Clock(pared.method.Stage(pipe, model, clocks), undo)
        clock.on_call = lambda clock=clock: (
            seen.append((clocks.index(clock), clock.step, clock.call, clock.steps, len(clock.kept)))
            or clock.kept.update(x=torch.zeros(8))
        )
    WAN.paint(pipe, 6)
    first, second = clocks
    assert first.stats is second.stats
    assert first.stats["bytes"] == 2 * 32, "what the first denoiser kept was held beside"
    assert [(step, call) for _, step, call, _, _ in seen] == [
        (s, c) for s in range(6) for c in (0, 1)
    ]
    assert {steps for *_, steps, _ in seen} == {6}
    switch = next(step for number, step, *_ in seen if number)
    assert 0 < switch < 5
    assert [step for _, step, _, _, kept in seen if not kept] == [0, 0, switch, switch]
    assert not first.kept
    undo.close()


def test_a_clock_on_one_of_two_denoisers_is_refused():
    with pytest.raises(InputError, match=r"WanPipeline has two denoisers; pared\.apply attaches"):
        Clock(wan(), ExitStack())
    pipe = wan()
    pipe.transformer = None  # the second alone is a pipeline, too
    assert pared.method.denoisers(pipe) == [pipe.transformer_2]


# What is kept -----------------------------------------------------------------------------------


def test_memory_is_dropped_behind_the_last_step():
    pipe = pixart()
    undo = ExitStack()
    clock = Clock(pipe, undo)
    found = []

    def keep():
        found.append(len(clock.kept))
        clock.kept["some"] = (torch.zeros(10), {"more": [torch.zeros(5)]})

    clock.on_call = keep
    paint(pipe, 3)
    paint(pipe, 2)
    assert found == [0, 1, 1, 0, 1]
    assert not clock.kept
    assert clock.stats == {"runs": 2, "calls": 5, "bytes": 60, "by_site": {}}
    undo.close()
    paint(pipe, 2)
    assert clock.stats["calls"] == 5


def test_guidance_that_ends_in_mid_run_halves_the_batch_and_begins_no_run():
    """As diffusers' documentation of callbacks shows it."""
    parts = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = StableDiffusionPipeline(
        unet=presets.build("toy:unet", device="cpu"),
        scheduler=DDPMScheduler(steps_offset=1, clip_sample=False),
        **dict.fromkeys(parts),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    seen = Follower(pipe)
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))

    def end(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    text = torch.randn(1, 4, 32, generator=seeded())
    for _ in range(2):
        pipe(
            prompt_embeds=text,
            negative_prompt_embeds=torch.zeros_like(text),
            num_inference_steps=4,
            height=64,
            width=64,
            output_type="latent",
            callback_on_step_end=end,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
    assert sizes == [2, 2, 1, 1] * 2
    assert seen.runs == [singles(4)] * 2
    # What the larger batch kept is dropped, since nobody asks for it any more.
    assert {shapes[0][0][0] for _, shapes in seen.clock._hands.memory} == {1}


# Bare denoisers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return presets.build("toy:dit", device="cpu")


@pytest.fixture
def call(model):
    """Call the denoiser: latents by the seed of their noise, and a label."""
    family = anatomy.of(model)

    def denoise(time, latents=0, label=0, batch=1):
        x = torch.randn(batch, 4, 8, 8, generator=seeded(latents))
        with torch.no_grad():
            family.denoise(
                model, x, torch.full((batch,), time), {"label": torch.full((batch,), label)}
            )

    return denoise


@pytest.fixture
def seen(model):
    follower = Follower(model)
    yield follower
    follower.undo.close()
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_rise_begins_a_run(seen, call):
    for time in (900, 500, 100, 900, 500, 600, 200):
        call(time, latents=time)
    assert seen.runs == [singles(3), singles(2), singles(2)]
    assert seen.clock.steps is None


def test_prompts_in_turn_share_their_latents(seen, call):
    for _ in range(2):
        for time in (900, 500, 100):
            for label in (0, 1):
                call(time, time, label)
    assert seen.runs == [[(step, i) for step in range(3) for i in range(2)]] * 2


def test_heun_on_a_bare_denoiser(seen, call):
    for _ in range(2):
        for number, time in enumerate((900, 500, 500, 100, 100)):
            for label in (0, 1):
                call(time, number, label)
    assert seen.runs == [[(step, i) for step in range(5) for i in range(2)]] * 2


def test_runs_of_one_step(seen, call):
    for latents in (0, 1, 1, 2):  # the third is the second again: a repetition, no guidance
        call(900, latents)
    assert seen.runs == [singles(1)] * 4


def test_guidance_in_runs_of_one_step(seen, call):
    for latents in (0, 1):
        for label in (0, 1):
            call(900, latents, label)
    assert seen.runs == [[(0, 0), (0, 1)]] * 2


def test_other_shapes_and_types_begin_a_run(seen, call, model):
    call(900)
    call(500, batch=2)
    call(500, batch=1)
    call(400, batch=1)
    model.double()
    inputs = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.full((1,), 300)
    model(*inputs, class_labels=torch.zeros(1, dtype=torch.long))
    model.float()
    assert seen.runs == [singles(1), singles(1), singles(2), singles(1)]


def test_a_bare_denoiser_is_told_its_steps(model, call):
    follower = Follower(model, steps=2)
    for time in (900, 500):
        call(time)
        assert follower.clock.steps == 2
    assert not follower.clock.kept
    follower.undo.close()


def test_a_failed_call_begins_a_run(seen, call, model):
    call(900)
    hook = model.transformer_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        call(500)
    hook.remove()
    call(400)
    assert seen.runs == [singles(2), singles(1)]


def test_a_call_that_another_method_refuses_has_failed_for_all(model, call):
    """Whichever hears of it first."""
    followers = [Follower(model) for _ in range(2)]
    for refusing in (0, 1):
        clock = followers[refusing].clock
        call(900)
        own, clock.on_call = clock.on_call, fail
        with pytest.raises(ZeroDivisionError):
            call(500)
        clock.on_call = own
        call(400)
    for follower in followers:
        follower.undo.close()
    # The first has seen the call that the second refused.
    assert followers[0].runs == [singles(1), singles(1), singles(2), singles(1)]
    assert followers[1].runs == [singles(1)] * 4


@pytest.fixture
def found(model):
    """What every call finds kept: the steps in which such a call was made before."""
    undo = ExitStack()
    clock, found = Clock(model, undo), []

    def keep():
        found.append(list(clock.kept.setdefault("steps", [])))
        clock.kept["steps"].append(clock.step)

    clock.on_call = keep
    yield found
    undo.close()


def test_what_a_step_had_no_call_for_is_dropped(found, call):
    """Guidance that pauses for a step comes back to nothing."""
    for time, labels in ((900, (0, 1)), (700, (0, 1)), (500, (0,)), (300, (0, 1)), (100, (0, 1))):
        for label in labels:
            call(time, time, label)
    assert found == [[], [], [0], [0], [0, 1], [0, 1, 2], [], [0, 1, 2, 3], [3]]


def test_what_was_kept_under_other_settings_or_prompts_is_dropped(found, model):
    inputs = torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)
    changes = [{}, {}, {"return_dict": False}, {"return_dict": False}]
    changes += [{"class_labels": torch.ones(1, dtype=torch.long)}] * 2
    for step, change in enumerate(changes):
        time = torch.full((1,), 900 - 100 * step)
        model(inputs[0], time, **({"class_labels": inputs[1]} | change))
    assert found == [[], [0], [], [2], [], [4]]


@pytest.mark.parametrize(
    ("toy", "name"),
    [
        ("sd3", "pooled_projections"),
        ("sdxl", "added_cond_kwargs"),
        ("sdxl", "cross_attention_kwargs"),
        ("pixart", "encoder_attention_mask"),
    ],
)
def test_what_else_says_what_to_paint_is_compared(toy, name):
    """One change in mid-run, of this alone; an equal tensor of another run of the encoder isn't."""
    model, undo = presets.build(f"toy:{toy}", device="cpu"), ExitStack()
    clock, found = Clock(model, undo), []
    clock.on_call = lambda: found.append(clock.kept.setdefault("step", clock.step))
    family = anatomy.of(model)
    example = family.example(1, 8, 8, text_tokens=4, generator=seeded())
    calls = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        family.denoise(model, *example)
        hook.remove()
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        args, kwargs = calls[0]
        given = dict(zip(names, args, strict=False)) | kwargs
        if name == "encoder_attention_mask":
            given[name] = torch.ones(1, 4)
        if name == "cross_attention_kwargs":
            given[name] = {"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]}
        for step, change in enumerate((0, 0, 1, 1)):
            value = tree_map_only(torch.Tensor, lambda x, by=change: x * (1 - by), given[name])
            time = torch.full((1,), 900 - 100 * step)
            model(**(given | {name: value, "timestep": time}))
    undo.close()
    # Behind the first call, which begins a run at a timestep of its own.
    assert found[1:] == [0, 0, 2, 2]


def test_settings_are_compared_with_those_of_the_same_call(found, model):
    """Two calls of a step may differ in their settings, as those of skip-layer guidance do."""
    x, label = torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)
    for step in range(3):
        for scale in (1.0, 2.0 if step < 2 else 3.0):
            model(
                x,
                torch.full((1,), 900 - 100 * step),
                class_labels=label + (scale > 1),
                cross_attention_kwargs={"ip_adapter_masks": scale},
            )
    assert found == [[], [], [0], [0], [0, 1], []]


def test_kept_bytes_are_those_that_cannot_be_freed():
    whole = torch.zeros(8, 4)
    kept = {"view": whole[:1], "same": (whole, [whole.T]), "more": {"other": torch.zeros(3)}}
    assert held_bytes(kept) == 4 * (8 * 4 + 3)
    assert held_bytes({"none": None, "step": 3}) == 0


def test_bytes_of_threads_add_up(model):
    undo = ExitStack()
    clock, together = Clock(model, undo), threading.Barrier(2, timeout=30)
    clock.on_call = lambda: clock.kept.update(x=torch.zeros(10))
    inputs = torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)

    def work():
        for time in (900, 500):
            together.wait()
            model(inputs[0], torch.full((1,), time), class_labels=inputs[1])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.stats["bytes"] == 2 * 40
    # What ended threads kept is gone, and isn't counted any more.
    clock.on_call = lambda: clock.kept.update(x=torch.zeros(15))
    model(inputs[0], torch.full((1,), 900), class_labels=inputs[1])
    assert clock.stats["bytes"] == 2 * 40
    undo.close()


# Copies and refusals ----------------------------------------------------------------------------


def test_a_copy_has_a_clock_of_its_own(model, call):
    follower = Follower(model)
    model.follower = SimpleNamespace(of=follower)  # as a processor holds what it belongs to
    call(900)
    call(500)
    twin = copy.deepcopy(model)
    del model.follower
    copied = twin.follower.of
    assert copied is not follower and not copied.clock.kept and follower.clock.kept
    copied.runs = [*copied.runs]
    twin(torch.randn(1, 4, 8, 8), torch.full((1,), 400), class_labels=torch.zeros(1).long())
    assert copied.runs == [singles(2), singles(1)] and follower.runs == [singles(2)]
    follower.undo.close()


def test_a_copy_of_a_pipeline_follows_its_own_calls():
    pipe = pixart()
    follower = Follower(pipe)
    pipe.transformer.follower = SimpleNamespace(of=follower)
    paint(pipe, 2)
    twin = pixart(transformer=copy.deepcopy(pipe.transformer))
    paint(twin, 2)
    assert follower.runs == [singles(2)]
    assert twin.transformer.follower.of.runs == [singles(2)] * 2


def test_nothing_is_added_to_the_model(model):
    before = [name for name, _ in model.named_modules()], list(model.state_dict())
    follower = Follower(model)
    assert before == ([name for name, _ in model.named_modules()], list(model.state_dict()))
    follower.undo.close()


def test_a_denoiser_without_timestep_is_refused():
    with pytest.raises(InputError, match="Linear takes no timestep"):
        Clock(nn.Linear(2, 2), ExitStack())


def test_a_cache_of_diffusers_on_the_same_model_is_refused():
    transformer = presets.build("toy:flux", device="cpu")
    family = anatomy.of(transformer)
    example = family.example(1, 8, 8, text_tokens=4)
    undo = ExitStack()
    clock = Clock(transformer, undo)
    transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(InputError, match=r"has a cache of diffusers enabled.* disable_cache first"):
        family.denoise(transformer, *example)
    with pytest.raises(InputError, match="has a cache of diffusers enabled"):
        Clock(transformer, ExitStack())
    transformer.disable_cache()
    family.denoise(transformer, *example)
    assert clock.stats["runs"] == 1
    undo.close()


@pytest.mark.parametrize("spec", ["attention-map-reuse", "re-ttention:warmup=1,keep=0.25"])
def test_an_attention_processor_that_was_replaced_since_is_refused_and_stays(spec):
    way = next(way for way in WAYS if way.name == "sd")
    pipe = way.build()
    handle = pared.apply(pipe, pared.parse(spec))
    way.paint(pipe)
    counted = copy.deepcopy(handle.stats)
    pipe.enable_attention_slicing(1)
    theirs = pipe.unet.attn_processors
    wanted = (
        r"attention processor of \S+ of this UNet2DConditionModel was replaced since by a Sliced"
    )
    with pytest.raises(InputError, match=wanted):
        way.paint(pipe)
    assert handle.stats == counted
    handle.remove()
    assert all(now is theirs[name] for name, now in pipe.unet.attn_processors.items())
    way.paint(pipe)


def test_a_part_that_was_replaced_since_is_refused():
    transformer = presets.build("toy:flux", device="cpu")
    family = anatomy.of(transformer)
    undo = ExitStack()
    Clock(transformer, undo)
    path = "single_transformer_blocks.1.proj_out"
    family.replace(path, copy.deepcopy(transformer.get_submodule(path)))
    with pytest.raises(InputError, match=r"single_transformer_blocks\.1\.proj_out .* was replaced"):
        family.denoise(transformer, *family.example(1, 8, 8, text_tokens=4))
    undo.close()
