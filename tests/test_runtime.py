"""The clock of a run: steps, calls and memory, read from calls of real pipelines and denoisers."""

import copy
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
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

from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.runtime import Clock, held_bytes


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
        self.runs = []

    def write(self):
        clock = self.clock
        if clock.stats["runs"] > len(self.runs):
            self.runs.append([])
            self.steps = clock.steps
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
    assert clock.stats == {"runs": 2, "calls": 5, "bytes": 60}
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
