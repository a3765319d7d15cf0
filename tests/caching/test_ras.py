"""RAS: its paper's checks; those that need no weights come with the package."""

import inspect
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LuminaPipeline,
    PixArtSigmaPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)

import pared
from pared import anatomy
from pared.anatomy import flux, presets
from pared.attention.edit import EDiT
from pared.attention.re_ttention import Rettention
from pared.bench.peers import FirstBlockCache
from pared.caching import ras_checks, regional
from pared.caching.attention_map_reuse import AttentionMapReuse
from pared.caching.ras import RAS
from pared.caching.regions import patch_metric
from pared.caching.taylorseer import TaylorSeer
from pared.errors import InputError
from pared.worlds.house import folder_of

CHECKS = [f for name, f in inspect.getmembers(ras_checks) if name.startswith("check_")]
# Of six steps these: full, filled, regional, filled, regional, regional.
QUICK = RAS(start=2, resets=(3,))


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def toy(name):
    """A toy whose gates don't start at zero."""
    model = presets.build(f"toy:{name}", device="cpu")
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=seeded()))
    return model


# In stock pipelines -------------------------------------------------------------------------------

PIPELINES = {
    "sd3": StableDiffusion3Pipeline,
    "lumina": LuminaPipeline,
    "flux": FluxPipeline,
    "pixart": PixArtSigmaPipeline,
}


def pipeline(name, cls=None, scheduler=None, **parts):
    """A stock pipeline without encoders, 48 patches to a picture."""
    cls = cls or PIPELINES[name]
    others = set(inspect.signature(cls).parameters) - {"transformer", "scheduler"}
    parts = {n: None for n in others if n not in ("force_zeros_for_empty_prompt",)} | parts
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    pipe = cls(transformer=toy(name), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, steps=6, pictures=1, guidance=3.0, **call):
    """Latents of pictures whose prompts come as embeddings, guided unless told otherwise."""
    name = anatomy.of(pipe.transformer).name
    text = torch.randn(pictures, 5, 64, generator=seeded(7))
    given = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
    masked = name in ("lumina", "pixart")
    beside = "prompt_attention_mask" if masked else "pooled_prompt_embeds"
    width = {"sd3": 64, "flux": 32}.get(name, 5)
    more = torch.ones(pictures, 5) if masked else torch.ones(pictures, width)
    negative = f"negative_{beside}" if masked else "negative_pooled_prompt_embeds"
    given |= {beside: more, negative: more}
    if name == "pixart":
        given |= {"negative_prompt": None, "use_resolution_binning": False}
    given |= {"true_cfg_scale" if name == "flux" else "guidance_scale": guidance}
    return pipe(
        **given,
        num_inference_steps=steps,
        generator=[seeded(number) for number in range(pictures)],
        height=128,
        width=96,
        output_type="latent",
        **call,
    ).images


def watched(pipe):
    """The active patches of every regional call from now on."""
    regions, seen = ras_checks._regions(pipe.transformer), []
    chosen = regions._chosen

    def follow(update):
        seen.append(chosen(update))
        return seen[-1]

    regions._chosen = follow
    return seen


@pytest.mark.parametrize("name", ["sd3", "lumina", "flux", "pixart"])
@pytest.mark.filterwarnings("ignore:ras is validated for Euler")
def test_a_run_of_a_pipeline(name):
    pipe = pipeline(name, scheduler=DDIMScheduler() if name == "pixart" else None)
    base = paint(pipe)
    for off in (RAS(ratio=1), RAS(start=6)):
        with pared.apply(pipe, off) as handle:
            assert torch.equal(paint(pipe), base)
        assert handle.stats["ras"]["bytes"] == 0
    with pared.apply(pipe, QUICK) as handle:
        first, second = paint(pipe), paint(pipe)
        other = paint(pipe, 5, pictures=2)
        assert torch.equal(paint(pipe), first)
    assert torch.equal(first, second) and not torch.equal(first, base)
    assert first.isfinite().all() and other.isfinite().all()
    assert torch.equal(paint(pipe), base)
    stats, passes = handle.stats["ras"], 2 if name == "flux" else 1
    # Three of six steps, and two of five, in 48 patches.
    assert stats["reused"] == stats["sites"] * passes * (3 + 3 + 2 + 3)
    assert stats["computed"] == stats["sites"] * passes * (3 + 3 + 3 + 3)
    assert stats["active_patches"] * 2 == stats["patches"] == passes * 11 * 48


def test_halves_of_guidance_share_their_patches_and_pictures_dont():
    pipe = pipeline("sd3")
    with pared.apply(pipe, QUICK):
        seen = watched(pipe)
        paint(pipe, pictures=2)
    assert len(seen) == 3
    for active in seen:
        negative, positive = active.chunk(2)
        assert active.shape == (4, 24) and torch.equal(negative, positive)
        assert not torch.equal(negative[0], negative[1])
    assert not torch.equal(seen[0], seen[1])


def test_guidance_in_turn_shares_the_patches_of_the_first_call():
    pipe = pipeline("flux")
    with pared.apply(pipe, QUICK):
        seen = watched(pipe)
        paint(pipe)
    assert len(seen) == 6
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first, second)


def test_skip_layer_guidance_has_a_memory_of_its_own():
    pipe = pipeline("sd3")
    skips = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}
    base = paint(pipe, 8, **skips)
    with pared.apply(pipe, QUICK) as handle:
        first, second = paint(pipe, 8, **skips), paint(pipe, 8, **skips)
    assert torch.equal(first, second) and not torch.equal(first, base)
    # The second call of a step, made from step 1 on, skips one of four attentions.
    assert handle.stats["ras"]["calls"] == 2 * (8 + 7)


@pytest.mark.parametrize("name", ["sd3", "lumina"])
def test_patches_are_ranked_by_the_guided_prediction(name, monkeypatch):
    pipe, predictions = pipeline(name), []
    step = pipe.scheduler.step

    def follow(prediction, *args, **kwargs):
        predictions.append(prediction)
        return step(prediction, *args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", follow)
    with pared.apply(pipe, RAS(start=2, k=0)):
        seen = watched(pipe)
        paint(pipe)
    family = anatomy.of(pipe.transformer)
    for prediction, active in zip(predictions[1:-1], seen, strict=True):
        metric = patch_metric(family.patches(prediction), "std")
        lowest = metric.topk(24, largest=False).indices.sort(dim=1).values
        assert torch.equal(active, lowest.expand(2, -1))


def test_what_is_kept_has_the_size_of_its_formula():
    pipe = pipeline("sd3")
    with pared.apply(pipe, QUICK) as handle:
        paint(pipe, pictures=2, guidance=1.0)
    batch, patches, width, attentions = 2, 48, 32, 3 + 1
    keys = attentions * 2 * batch * patches * width * 4
    latents = outputs = batch * patches * 4 * 16 * 4
    numbers = batch * patches * 4 + batch * patches // 2 * 8
    assert handle.stats["ras"]["bytes"] == keys + latents + outputs + numbers


def test_half_precision():
    pipe = pipeline("sd3")
    pipe.transformer.to(torch.bfloat16)
    with pared.apply(pipe, QUICK) as handle:
        half = torch.zeros(1, 5, 64, dtype=torch.bfloat16)
        pooled = torch.zeros(1, 64, dtype=torch.bfloat16)
        found = pipe(
            prompt_embeds=half,
            pooled_prompt_embeds=pooled,
            num_inference_steps=6,
            guidance_scale=1.0,
            height=128,
            width=96,
            output_type="latent",
        ).images
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert handle.stats["ras"]["reused"] == 3 * 4


# Bare denoisers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux", "dit"])
def test_a_batch_is_its_samples(name):
    model = toy(name)
    family = anatomy.of(model)
    latents, timestep, condition = family.example(2, 16, 16, text_tokens=5, generator=seeded())

    @torch.no_grad()
    def end(rows):
        now, part = latents[rows], {key: value[rows] for key, value in condition.items()}
        for time in (900, 800, 700, 600, 500):
            times = torch.full_like(timestep[rows], time)
            now = now - 0.1 * family.denoise(model, now, times, part)
        return now

    with pared.apply(model, QUICK):
        whole = end(slice(0, 2))
        for row in range(2):
            part = end(slice(row, row + 1))
            torch.testing.assert_close(whole[row : row + 1], part, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_caller_may_step_in_place():
    model = toy("flux")
    family = anatomy.of(model)
    ends = []
    for in_place in (False, True):
        latents, timestep, condition = family.example(1, 16, 16, text_tokens=5, generator=seeded())
        with pared.apply(model, QUICK):
            for time in (900, 800, 700, 600, 500):
                output = family.denoise(model, latents, torch.full_like(timestep, time), condition)
                if in_place:
                    latents.sub_(output.mul_(0.1))
                else:
                    latents = latents - output * 0.1
        ends.append(latents)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_steps_behind_the_end_are_the_models_own():
    modes = []
    model = toy("sd3")
    settings = RAS(start=1, end=3, resets=())
    with pared.apply(model, settings):
        regions = ras_checks._regions(model)
        model.register_forward_hook(lambda *_: modes.append(regions.plan.mode))
        ras_checks._run(model, ras_checks._latents(model, 5))
    assert modes == ["fill", "regional", "regional", "full", "full"]
    assert [settings.dense(step) for step in range(5)] == [True, False, False, True, True]


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 0}, r"ratio=0 doesn't work: .*default is 0\.5"),
        ({"start": 0}, r"start=0 doesn't work: .*default is 4"),
        ({"end": 4}, "end=4 leaves no step from start=4 on; give a later end"),
        ({"metric": "var"}, r"metric='var' doesn't work: .*'std' or 'norm'"),
        ({"high_ratio": 1.1}, "high_ratio=1.1 doesn't work"),
        ({"k": -1}, "k=-1 doesn't work"),
        ({"quantum": 0}, "quantum=0 doesn't work"),
    ],
)
def test_bad_settings_say_what_is_right(settings, words):
    with pytest.raises(InputError, match=words):
        RAS(**settings)


def test_settings_survive_a_spec():
    settings = pared.parse("ras:ratio=0.25,resets=[12,20],high_ratio=0.3,ramp=256")
    assert settings == RAS(ratio=0.25, resets=(12, 20), high_ratio=0.3, ramp=256)
    assert pared.parse(settings.spec()) == settings


def test_a_ramp_must_know_where_it_ends():
    model = toy("sd3")
    run = lambda: ras_checks._run(model, ras_checks._latents(model, 4))  # noqa: E731
    with pared.apply(model, RAS(start=1, ramp=8)), pytest.raises(InputError, match="give steps or"):
        run()
    for known in ({"steps": 4}, {"end": 4}):
        with pared.apply(model, RAS(start=1, ramp=8, ramp_every=1, **known)) as handle:
            run()
        stats = handle.stats["ras"]
        assert stats["active_patches"] == (32 + 8) + 32 + (32 - 8), stats


def test_other_schedulers_are_warned_of():
    odd = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    for scheduler in (DDIMScheduler(), odd):
        pipe = pipeline("pixart", scheduler=scheduler)
        with pytest.warns(UserWarning, match=f"{type(scheduler).__name__} may mix"):
            pared.apply(pipe, RAS()).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pared.apply(pipeline("sd3"), RAS()).remove()
        pared.apply(toy("pixart"), RAS()).remove()


def test_a_control_net_is_refused():
    net = SD3ControlNetModel.from_transformer(toy("sd3"), num_layers=1)
    pipe = pipeline("sd3", StableDiffusion3ControlNetPipeline, controlnet=net)
    with pytest.raises(InputError, match="whose ControlNet adds to all patches"):
        pared.apply(pipe, RAS())
    assert not pipe.transformer._forward_hooks


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "dit"])
def test_what_reuses_the_same_is_refused(name):
    """Maps of the attentions whose keys it keeps, and the output of the whole."""
    model, maps = toy(name), r"reuses \S*transformer_blocks\.0\.attn1?"
    whole = [TaylorSeer(sites="output"), FirstBlockCache()]
    others = [
        (AttentionMapReuse(), maps),
        (Rettention(), maps),
        *((w, "reuses deno") for w in whole),
    ]
    for other, words in others:
        for pair in ((RAS(), other), (other, RAS())):
            with pytest.raises(InputError, match=f"{pair[1].info.slug} {words}.* already reuses"):
                pared.apply(model, *pair)
    assert not model._forward_pre_hooks and not hasattr(model, "pared_leader")


def test_what_else_is_refused():
    model = toy("pixart")
    attn = anatomy.of(model).sites("self_attention")[0].module
    with pared.apply(model, RAS(start=1)):
        ras_checks._call(model, torch.randn(1, 4, 16, 16))
        with pytest.raises(InputError, match="takes no attention mask"):
            attn(torch.randn(1, 64, 32), attention_mask=torch.zeros(1, 1, 64))
    pared.convert(model, EDiT())
    with pytest.raises(InputError, match=r"ras reuses transformer_blocks\.0\.attn1, which edit"):
        pared.apply(model, RAS())
    config = presets.get("toy:pixart").denoiser.config | {"in_channels": 1, "out_channels": 2}
    narrow = type(model)(**config)
    with pytest.raises(InputError, match=r"one channel; use metric=norm"):
        pared.apply(narrow, RAS())
    with pared.apply(narrow, RAS(start=1, metric="norm")) as handle:
        ras_checks._run(narrow, ras_checks._latents(narrow, 3))
    assert handle.stats["ras"]["reused"] == 2 * 2


def test_reference_images_are_refused():
    model = toy("flux")
    family = anatomy.of(model)
    with pared.apply(model, RAS()):
        latents, timestep, condition = family.example(1, 8, 8, text_tokens=5)
        ids = flux.image_ids(4, 4)
        with pytest.raises(InputError, match="don't form one grid"):
            model(
                hidden_states=flux.pack(latents).repeat(1, 2, 1),
                encoder_hidden_states=condition["text"],
                pooled_projections=condition["pooled"],
                timestep=timestep / 1000,
                img_ids=torch.cat([ids, ids + torch.tensor([1.0, 0, 0])]),
                txt_ids=torch.zeros(5, 3),
                guidance=condition["guidance"],
            )


# On a trained model -------------------------------------------------------------------------------

PROMPTS = ["red apple", "sailboat", "tiger face", "hammer"]


@pytest.mark.slow
def test_what_keeps_a_trained_model_near_its_own_pictures(monkeypatch):
    """RMS distance to the model's own latents, 30 steps at a quarter of the patches.

    Seen: 0.0285; with k = 0.1 0.0458, then without dense steps in between 0.0909, and in the
    released code's direction 0.0558; without kept keys 0.286. The paper's order of low and high
    spread doesn't show on this model (chosen by high spread: 0.0286, and 0.0354 with k = 0.1), so
    it isn't asked for.
    """
    folder = folder_of("house:sd3")
    pipe = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(len(PROMPTS), 4, 16, 16, generator=seeded())

    def latents():
        return pipe(
            PROMPTS,
            num_inference_steps=30,
            guidance_scale=1.0,
            latents=noise.clone(),
            height=128,
            width=128,
            output_type="latent",
        ).images

    base, usual = latents(), {"ratio": 0.25, "resets": (12, 20)}

    def distance(**settings):
        with pared.apply(pipe, RAS(**(usual | settings))):
            return float((latents() - base).square().mean().sqrt())

    ras, slight = distance(), distance(k=0.1)
    assert ras < slight / 1.2, (ras, slight)
    without_resets = distance(k=0.1, resets=())
    assert without_resets > 1.5 * slight, (without_resets, slight)
    starved = distance(k=0.1, upstream_compat=True)
    assert starved > 1.1 * slight, (starved, slight)
    attended = regional.Regions.attended

    def among_active(self, path, key, value):
        return attended(self, path, key, value) if self.active is None else (key, value)

    monkeypatch.setattr(regional.Regions, "attended", among_active)
    assert (blind := distance()) > 3 * ras, (blind, ras)
