"""TaylorSeer: its paper's checks; those that need no weights come with the package."""

import inspect
from functools import partial
from itertools import product

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PixArtSigmaPipeline

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.caching import taylorseer_checks
from pared.caching.delta_dit import DeltaDiT
from pared.caching.taylorseer import TaylorSeer
from pared.errors import InputError
from pared.worlds.house import folder_of
from tests.caching.pipelines import WAYS

CHECKS = [f for name, f in inspect.getmembers(taylorseer_checks) if name.startswith("check_")]
WAY = {way.name: way for way in WAYS}
SITES = ("module", "block", "output")
QUICK = TaylorSeer(interval=3, warmup=2)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(family):
    return presets.build(f"toy:{family}", device="cpu")


# Pipelines --------------------------------------------------------------------------------------


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart(scheduler=None):
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    scheduler = scheduler or DDIMScheduler()
    return quiet(PixArtSigmaPipeline(transformer=toy("pixart"), scheduler=scheduler, **parts))


def paint(pipe, steps=9, seed=0, **call):
    text = torch.randn(1, 4, 64, generator=seeded(7))
    mask = torch.ones(1, 4)
    settings = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": text,
        "negative_prompt_embeds": torch.zeros_like(text),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "num_inference_steps": steps,
        "guidance_scale": 2.0,
        "generator": seeded(seed),
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    return pipe(**(settings | call)).images


@pytest.mark.parametrize("sites", SITES)
def test_a_run_of_a_pipeline(sites):
    pipe = pixart()
    base = paint(pipe)
    settings = TaylorSeer(interval=3, warmup=2, sites=sites)
    with pared.apply(pipe, settings) as handle:
        first = paint(pipe)
        paint(pipe, 3, seed=5)
        paint(pipe, 7, width=128)
        assert torch.equal(paint(pipe), first) and not torch.equal(first, base)
        other = paint(pipe, seed=1)
    assert torch.equal(paint(pipe), base)
    with pared.apply(pipe, settings) as handle:  # as if in a fresh process
        assert torch.equal(paint(pipe, seed=1), other)
    stats = handle.stats["taylorseer"]
    places = {"module": 6, "block": 2, "output": 1}[sites]
    # Full at 0, 1, 4 and 7.
    assert stats["computed"] == 4 * places and stats["forecast"] == 5 * places
    channels = {"module": 16 * 32, "block": 16 * 32, "output": 8 * 8 * 8}[sites]
    assert stats["bytes"] == places * 2 * 2 * channels * 4


@pytest.mark.parametrize("sites", SITES)
def test_guidance_in_turn_is_guidance_on_a_joint_batch(sites):
    pipe = pixart()
    with pared.apply(pipe, TaylorSeer(interval=3, warmup=2, sites=sites)):
        joint = paint(pipe)
    model, scheduler = pipe.transformer, pipe.scheduler
    text, mask = torch.randn(1, 4, 64, generator=seeded(7)), torch.ones(1, 4)
    family, latents = anatomy.of(model), torch.randn(1, 4, 8, 8, generator=seeded())
    scheduler.set_timesteps(9)
    with pared.apply(model, TaylorSeer(interval=3, warmup=2, sites=sites)), torch.no_grad():
        for time in scheduler.timesteps:
            plain, prompted = (
                family.denoise(model, latents, time[None], {"text": each, "mask": mask})
                for each in (torch.zeros_like(text), text)
            )
            guided = plain + 2.0 * (prompted - plain)
            latents = scheduler.step(guided, time, latents).prev_sample
    # A batch of two rounds otherwise than one; guidance and nine steps make that larger.
    torch.testing.assert_close(joint, latents, rtol=1e-3, atol=1e-4)


def test_schedulers_that_repeat_timesteps():
    """Rounds of the loop count: Heun makes 2 n - 1, PNDM n + 1."""
    pipe = pixart(HeunDiscreteScheduler())
    for clock in ("step", "time"):
        with pared.apply(pipe, TaylorSeer(interval=3, warmup=2, clock=clock)) as handle:
            assert torch.equal(paint(pipe, 5), paint(pipe, 5))
        assert handle.stats["taylorseer"]["computed"] == 2 * 6 * 4  # 0, 1, 4, 7 of 9
    way = WAY["sd, repeated timestep"]
    pipe = way.build()
    base = way.paint(pipe, 8)
    for sites, places in (("module", 12), ("block", 4), ("output", 1)):
        for clock in ("time", "step"):
            settings = TaylorSeer(interval=3, warmup=2, sites=sites, clock=clock)
            with pared.apply(pipe, settings) as handle:
                found = way.paint(pipe, 8)
                assert torch.equal(way.paint(pipe, 8), found) and not torch.equal(found, base)
                assert found.isfinite().all()
        assert handle.stats["taylorseer"]["computed"] == 2 * places * 4  # of 9


@pytest.mark.parametrize("sites", SITES)
def test_sd3_with_two_streams_and_a_last_block_without_text(sites):
    pipe = WAY["sd3.5"].build()
    run = partial(WAY["sd3.5"].paint, pipe, 8)
    base = run()
    with pared.apply(pipe, TaylorSeer(interval=3, warmup=2, sites=sites)) as handle:
        found = run()
        assert torch.equal(run(), found) and not torch.equal(found, base)
        # Skip-layer guidance makes a third call, for a time, with a memory of its own.
        skips = run(skip_guidance_layers=[1], skip_layer_guidance_stop=0.9)
        assert skips.isfinite().all()
    places = {"module": 3 + 3 + 2 + 1, "block": 3, "output": 1}[sites]
    assert len(handle.stats["taylorseer"]["by_site"]) == places
    assert torch.equal(run(), base)


# With other methods -----------------------------------------------------------------------------


def test_a_site_that_missed_full_steps_is_computed_when_it_is_too_old():
    """Delta-DiT passes every block by at odd steps; the full steps here are 0, 1, 4, 7, 10."""
    model = toy("dit")
    family = anatomy.of(model)
    latents, timestep, condition = family.example(1, 8, 8, generator=seeded())
    computed = []
    delta = DeltaDiT(cached=2, rule="rear")
    with pared.apply(model, delta, QUICK), torch.no_grad():
        block = family.blocks[0].module
        seer = block.attn1.forward.around.site.seer
        for step in range(12):
            family.denoise(model, latents, timestep - 10 * step, condition)
            (last,) = {known.step for known in seer.clock.kept.values()}
            computed.append(last == step)
    assert [step for step in range(12) if computed[step]] == [0, 4, 8, 10]


def test_over_delta_dit_both_claim_different_places():
    model = toy("pixart")
    for sites in ("module", "output"):
        with pared.apply(model, DeltaDiT(steps=8), TaylorSeer(sites=sites)) as handle:
            assert handle.stats.keys() == {"delta-dit", "taylorseer"}
    for sites in SITES:
        method = TaylorSeer(sites=sites)
        with pared.apply(model, method), pytest.raises(InputError, match="which taylorseer alr"):
            pared.apply(model, method)


# Settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "wanted"),
    [
        ("pixart", {"kinds": ["cross_attention"]}, {"0.attn2", "1.attn2"}),
        ("pixart", {"layers": [1]}, {"1.attn1", "1.attn2", "1.ff"}),
        ("pixart", {"layers": [0], "kinds": ["feed_forward"]}, {"0.ff"}),
        ("pixart", {"layers": [1], "sites": "block"}, {"1"}),
        ("flux", {"kinds": ["joint_attention"]}, {"0.attn", "1.attn", "0.proj_out", "1.proj_out"}),
        ("flux", {"layers": [3]}, {"1.proj_out"}),
        ("flux", {"kinds": ["feed_forward"], "layers": [0]}, {"0.ff", "0.ff_context"}),
    ],
)
def test_chosen_sites_alone_are_forecast(family, settings, wanted):
    model = toy(family)
    with pared.apply(model, TaylorSeer(warmup=1, interval=2, **settings)) as handle:
        outputs(model, (900, 800))
    by_site = handle.stats["taylorseer"]["by_site"]
    prefixes = ("single_transformer_blocks.", "transformer_blocks.")
    assert {path.split(prefixes[1])[-1] for path in by_site} == wanted
    assert all(counts == {"computed": 1, "forecast": 1} for counts in by_site.values())


@torch.no_grad()
def outputs(model, times, **size):
    family = anatomy.of(model)
    latents, timestep, condition = family.example(
        **({"batch": 1, "height": 8, "width": 8, "text_tokens": 4} | size), generator=seeded()
    )
    return [
        family.denoise(model, latents, torch.full_like(timestep, time), condition) for time in times
    ]


@pytest.mark.parametrize("sites", SITES)
def test_half_precision_and_the_type_of_factors(sites):
    times = (900, 800, 700, 600, 500)
    held = {}
    for dtype in (None, "float32", "bfloat16"):
        model = toy("flux").to(torch.bfloat16)
        settings = TaylorSeer(interval=4, warmup=2, order=2, sites=sites, dtype=dtype)
        plain = outputs(model, times)
        with pared.apply(model, settings) as handle:
            found = outputs(model, times)
        assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in found)
        assert torch.equal(found[1], plain[1])
        assert (found[4] - plain[4]).float().norm() < 0.3 * plain[4].float().norm()
        held[dtype] = handle.stats["taylorseer"]["bytes"]
    assert held["float32"] == 2 * held["bfloat16"]
    assert held[None] == held["float32" if sites == "block" else "bfloat16"]


@pytest.mark.parametrize("predictor", ["taylor", "newton"])
def test_series_by_the_clock_of_timesteps(predictor):
    """y_1 + (y_1 - y_0) (t - t_1) / (t_1 - t_0), at equal gaps that of the steps' numbers."""
    model, times = toy("pixart"), (900, 700, 650, 640, 300)
    plain = outputs(model, times)
    settings = {"warmup": 2, "interval": 4, "sites": "output", "predictor": predictor}
    with pared.apply(model, TaylorSeer(**settings, clock="time")):
        found = outputs(model, times)
    slope = (plain[1] - plain[0]) / (700 - 900)
    for time, output in zip(times[2:], found[2:], strict=True):
        torch.testing.assert_close(output, plain[1] + slope * (time - 700), rtol=1e-5, atol=1e-5)
    with pared.apply(model, TaylorSeer(**settings)):
        assert not torch.allclose(outputs(model, times)[2], found[2], rtol=1e-3, atol=1e-3)
    even, same = range(900, 200, -100), {}
    for clock in ("step", "time"):
        with pared.apply(model, TaylorSeer(**settings, order=2, clock=clock)):
            same[clock] = outputs(model, even)
    for one, other in zip(*same.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_newton_and_taylor_part_at_the_second_order():
    model, found = toy("pixart"), {}
    for predictor, order in product(("taylor", "newton"), (0, 1, 2)):
        with pared.apply(model, TaylorSeer(interval=4, order=order, predictor=predictor)):
            found[predictor, order] = outputs(model, range(900, 0, -100))[-1]
    for order in (0, 1):
        torch.testing.assert_close(found["taylor", order], found["newton", order])
    assert not torch.allclose(found["taylor", 2], found["newton", 2], rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["taylor", 0], found["taylor", 1])


def test_the_forecast_output_comes_as_the_model_gives_it():
    """As a tuple or as diffusers' class; and what the caller does to it leaves the next alone."""
    model = toy("dit")
    latents, timestep, condition = anatomy.of(model).example(1, 8, 8, generator=seeded())
    settings = TaylorSeer(warmup=1, interval=4, order=0, sites="output")
    for given, kind in ({"return_dict": False}, tuple), ({}, None):
        with pared.apply(model, settings), torch.no_grad():
            samples = []
            for step in range(4):
                label = condition["label"]
                output = model(latents, timestep - step, class_labels=label, **given)
                assert (type(output) is tuple) == (kind is tuple)
                samples.append(output[0].clone())
                assert kind is tuple or output.sample is output[0]
                output[0].zero_()
        assert all(torch.equal(sample, samples[0]) for sample in samples) and samples[0].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"interval": 0}, r"interval=0 doesn't work: .*default is 4"),
        ({"warmup": 0}, r"warmup=0 doesn't work: .*default is 3"),
        ({"order": -1}, r"order=-1 doesn't work: .*default is 1"),
        ({"clock": "sigma"}, r"clock='sigma' doesn't work: .*'step' or 'time'"),
        ({"sites": "all"}, r"sites='all' doesn't work: .*'module', 'block' or 'output'"),
        ({"kinds": ["ff"]}, r"kinds='ff' doesn't work: .*'feed_forward'"),
        ({"sites": "block", "kinds": ["feed_forward"]}, r"kinds choose modules, and sites=block"),
        ({"sites": "output", "layers": [0]}, r"layers choose blocks, and sites=output forecasts"),
    ],
)
def test_bad_settings_say_what_is_right(settings, words):
    with pytest.raises(InputError, match=words):
        TaylorSeer(**settings)


def test_refusals():
    model = toy("pixart")
    with pytest.raises(InputError, match=r"layers=\[7\] don't exist in PixArt.* the blocks 0 to 1"):
        pared.apply(model, TaylorSeer(layers=(0, 7)))
    with pytest.raises(InputError, match=r"taylorseer can't be used .*it finds no site there"):
        pared.apply(model, TaylorSeer(kinds=("joint_attention",)))
    model = toy("sd3")
    model.enable_forward_chunking(8, dim=1)
    with pared.apply(model, QUICK), pytest.raises(InputError, match=r"ff runs several times in on"):
        outputs(model, (900,))


# On a trained model -----------------------------------------------------------------------------

PROMPTS = ["red apple", "sailboat", "tiger face", "flag: Japan"]


@pytest.mark.slow
def test_a_forecast_is_nearer_than_reuse_and_than_fewer_steps():
    """RMS distance to the model's own latents of 50 steps, W = 3.

    Seen with orders 0 and 1, and as many steps as are full: N = 3 0.0137, 0.0088 and 0.0142, N = 4
    0.0215, 0.0144 and 0.0195, N = 6 0.0354, 0.0224 and 0.0262.
    """
    pipe = quiet(PixArtSigmaPipeline.from_pretrained(folder_of("house:pixart")))
    noise = torch.randn(len(PROMPTS), 4, 16, 16, generator=seeded())

    def latents(steps=50):
        return pipe(
            PROMPTS,
            num_inference_steps=steps,
            guidance_scale=1.0,
            latents=noise.clone(),
            height=128,
            width=128,
            use_resolution_binning=False,
            clean_caption=False,
            output_type="latent",
        ).images

    def distance_to(base, found):
        return float((found - base).square().mean().sqrt())

    base = latents()
    distance = {"14 steps": distance_to(base, latents(14))}
    for interval, order in product((3, 4, 6), (0, 1)):
        with pared.apply(pipe, TaylorSeer(interval=interval, order=order)):
            distance[interval, order] = distance_to(base, latents())
    for interval in (3, 4, 6):
        assert distance[interval, 1] < 0.9 * distance[interval, 0], distance
    assert distance[4, 1] < distance["14 steps"], distance
