"""Re-ttention: its paper's checks; those that need no weights come with the package."""

import copy
import inspect

import pytest
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention import re_ttention, re_ttention_checks
from pared.attention.edit import EDiT
from pared.attention.re_ttention import INFO, Kept, Rettention, statistics
from pared.errors import InputError
from pared.worlds.house import folder_of

CHECKS = [f for name, f in inspect.getmembers(re_ttention_checks) if name.startswith("check_")]
QUICK = Rettention(keep=0.1, warmup=1, interval=3)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    pipe = PixArtSigmaPipeline(
        transformer=presets.build("toy:pixart", device="cpu"),
        scheduler=DDIMScheduler(),
        **dict.fromkeys(("tokenizer", "text_encoder", "vae")),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, steps=6, pictures=1, **call):
    text = torch.randn(pictures, 4, 64, generator=seeded(7))
    mask = torch.ones(pictures, 4)
    return pipe(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        prompt_attention_mask=mask,
        negative_prompt_attention_mask=mask,
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=seeded(),
        height=128,
        width=128,
        use_resolution_binning=False,
        output_type="latent",
        **call,
    ).images


def test_a_run_of_a_pipeline(pipe):
    base = paint(pipe, 20)
    with pared.apply(pipe, Rettention()) as handle:
        first, second = paint(pipe, 20), paint(pipe, 20)
    assert torch.equal(first, second) and not torch.equal(first, base)
    assert torch.equal(paint(pipe, 20), base)
    stats = handle.stats["re-ttention"]
    # Two layers, two rows (prompt and negative prompt), 64 tokens of 2 x 16 channels; rho is small.
    residuals, rhos = 2 * 2 * 64 * 32 * 4, 2 * 2 * 2 * 64 * 4
    assert stats == {
        "runs": 2,
        "calls": 40,
        "bytes": residuals + rhos,
        "sites": 2,
        "full_steps": 16,
        "sparse_steps": 24,
        "computed": 2 * 16,
        "reused": 2 * 24,
        "by_site": {
            f"transformer_blocks.{n}.attn1": {"computed": 16, "reused": 24} for n in (0, 1)
        },
    }


def test_a_run_shorter_than_the_warmup_is_the_models_own(pipe):
    base = paint(pipe, 4)
    with pared.apply(pipe, Rettention()) as handle:
        assert torch.equal(paint(pipe, 4), base)
    stats = handle.stats["re-ttention"]
    assert stats["sparse_steps"] == stats["bytes"] == 0 and stats["full_steps"] == 4


def test_steps_are_counted_by_what_the_attentions_did(pipe):
    own = pipe.transformer.attn_processors

    def replace(step, timestep, latents):
        if step == 2:
            pipe.transformer.set_attn_processor(AttnProcessor2_0())

    with pared.apply(pipe, QUICK) as handle:
        paint(pipe, callback=replace)
    stats = handle.stats["re-ttention"]
    # Of the steps 0, 1 and [2]; from there on nothing of it ran.
    assert (stats["full_steps"], stats["sparse_steps"], stats["calls"]) == (2, 1, 6)
    pipe.transformer.set_attn_processor(own)


def test_nothing_leaks_from_one_run_into_the_next(pipe):
    with pared.apply(pipe, QUICK):
        wanted = paint(pipe)

    def interrupt(step, timestep, latents):
        if step == 3:
            raise KeyboardInterrupt

    with pared.apply(pipe, QUICK):
        paint(pipe, 5)
        paint(pipe, pictures=2)
        with pytest.raises(KeyboardInterrupt):
            paint(pipe, callback=interrupt)
        assert torch.equal(paint(pipe), wanted)


def example(family, batch=1):
    return family.example(batch, 16, 16, text_tokens=5, generator=seeded())


@torch.no_grad()
def outputs(family, model, condition):
    """Of six steps on the same latents."""
    latents, timestep, _ = example(family)
    times = [torch.full_like(timestep, time) for time in (900, 750, 600, 450, 300, 150)]
    return torch.stack([family.denoise(model, latents, time, condition) for time in times])


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_guidance_in_turn_mixes_no_memories(name):
    model = presets.build(f"toy:{name}", device="cpu")
    family = anatomy.of(model)
    latents, timestep, condition = example(family)
    if name == "dit":
        other = {"label": (condition["label"] + 1) % 10}
    else:
        other = condition | {"text": torch.zeros_like(condition["text"])}
    with pared.apply(model, QUICK):
        alone = [outputs(family, model, each) for each in (condition, other)]
    found = []
    with pared.apply(model, QUICK) as handle, torch.no_grad():
        for time in (900, 750, 600, 450, 300, 150):
            now = torch.full_like(timestep, time)
            found += [family.denoise(model, latents, now, each) for each in (condition, other)]
    assert torch.equal(torch.stack(found[::2]), alone[0])
    assert torch.equal(torch.stack(found[1::2]), alone[1])
    assert handle.stats["re-ttention"]["sparse_steps"] == 3  # of 0, 1, [2, 3], 4, [5]


@pytest.mark.parametrize("name", INFO.families)
def test_removal_puts_the_very_processors_back(name):
    model = presets.build(f"toy:{name}", device="cpu")
    family = anatomy.of(model)
    sites = family.sites("self_attention", "joint_attention")
    before = [site.module.processor for site in sites]
    weights, modules = list(model.state_dict()), [n for n, _ in model.named_modules()]
    wanted = outputs(family, model, example(family)[2])
    handle = pared.apply(model, QUICK)
    assert weights == list(model.state_dict())
    assert modules == [n for n, _ in model.named_modules()]
    found = outputs(family, model, example(family)[2])
    assert torch.equal(found[0], wanted[0])  # the warm-up
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5)  # a cache step
    assert not torch.allclose(found[2:4], wanted[2:4], rtol=1e-4, atol=1e-5)
    handle.remove()
    assert all(site.module.processor is own for site, own in zip(sites, before, strict=True))
    assert torch.equal(outputs(family, model, example(family)[2]), wanted)
    assert not model._forward_hooks


def test_a_batch_is_its_samples():
    model = presets.build("toy:sd3", device="cpu")
    family = anatomy.of(model)
    latents, timestep, condition = example(family, batch=2)

    @torch.no_grad()
    def last(rows):
        part = {name: value[rows] for name, value in condition.items()}
        with pared.apply(model, QUICK):
            for time in (900, 600, 300):
                now = torch.full_like(timestep[rows], time)
                output = family.denoise(model, latents[rows], now, part)
        return output

    whole = last(slice(0, 2))
    for row in range(2):
        part = last(slice(row, row + 1))
        torch.testing.assert_close(whole[row : row + 1], part, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_model_works_by_itself():
    model = presets.build("toy:dit", device="cpu")
    family = anatomy.of(model)
    condition = example(family)[2]
    with pared.apply(model, QUICK):
        wanted = outputs(family, model, condition)
        latents, timestep, _ = example(family)
        with torch.no_grad():
            for time in (900, 600):  # a run in the middle
                family.denoise(model, latents, torch.full_like(timestep, time), condition)
            twin = copy.deepcopy(model)
            assert torch.equal(outputs(anatomy.of(twin), twin, condition), wanted)
            clock = family.sites("self_attention")[0].module.processor.plan.clock
            assert clock.step == 1 and len(clock.kept) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warmup": 0}, r"warmup=0 doesn't work: .*default is 5"),
        ({"interval": 0}, r"interval=0 doesn't work: .*default is 5"),
        ({"keep": 0}, r"keep=0 doesn't work: .*default is 0\.03125"),
        ({"keep": 1.01}, r"keep=1\.01 doesn't work"),
        ({"ramp": -0.1}, r"ramp=-0\.1 doesn't work"),
    ],
)
def test_bad_settings_say_what_is_right(settings, words):
    with pytest.raises(InputError, match=words):
        Rettention(**settings)


def test_refusals():
    model = presets.build("toy:dit", device="cpu")
    with pared.apply(model, QUICK), pytest.raises(InputError, match=r"attn1, whose Switch isn't"):
        QUICK.attach(model)
    family = anatomy.of(model)
    with pared.apply(model, QUICK), pytest.raises(InputError, match="takes no attention mask"):
        attn = family.sites("self_attention")[0].module
        attn(torch.randn(1, 4, 32), attention_mask=torch.zeros(1, 1, 4))
    pared.convert(model, EDiT())
    with pytest.raises(InputError, match=r"re-ttention reuses transformer_blocks\.0\.attn1, which"):
        pared.apply(model, QUICK)
    bare = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
    )
    with pytest.raises(InputError, match=r"re-ttention can't be used .*it finds no site there"):
        pared.apply(bare, QUICK)


def test_chosen_layers_alone_are_worked_on():
    model = presets.build("toy:pixart", device="cpu")
    sites = anatomy.of(model).sites("self_attention")
    plain = [site.module.processor for site in sites]
    with pared.apply(model, pared.Rettention(layers=(1,))):
        changed = [a.module.processor is not b for a, b in zip(sites, plain, strict=True)]
        assert changed == [False, True]
    # A layer that a conversion replaced is no obstacle to the others.
    pared.convert(model, EDiT(layers=(0,)))
    with pared.apply(model, pared.Rettention(layers=(1,))):
        pass
    with pytest.raises(InputError, match=r"re-ttention: layers=\[7\] have no"):
        pared.apply(model, pared.Rettention(layers=(7,)))


# On a trained model -----------------------------------------------------------------------------

PROMPTS = [
    "red apple",
    "sailboat",
    "grinning face",
    "tiger face",
    "woman firefighter: dark skin tone",
    "flag: Japan",
    "red heart",
    "hammer",
]


def _zero(x):
    return torch.zeros_like(x)


VARIANTS = {
    "window": lambda full, part: Kept(torch.ones_like(full.lse), _zero(full.output)),
    "rho": lambda full, part: Kept(statistics(full, part).rho, _zero(full.output)),
    "R": lambda full, part: Kept(torch.ones_like(full.lse), full.output - part.output),
    "rho + R": statistics,
}


@pytest.mark.slow
def test_the_residual_carries_a_trained_model(monkeypatch):
    """RMS distance to the model's own latents: what needs R, and what rho can't do alone.

    Seen at 6.6% of the keys: window 0.633, rho 0.633, R 0.1217, rho + R 0.1223. The paper's order
    of the last two doesn't show on this model, so it isn't asked for.
    """
    pipe = PixArtSigmaPipeline.from_pretrained(folder_of("house:pixart"))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(len(PROMPTS), 4, 16, 16, generator=seeded())

    def latents():
        return pipe(
            PROMPTS,
            num_inference_steps=20,
            guidance_scale=1.0,
            latents=noise.clone(),
            height=128,
            width=128,
            use_resolution_binning=False,
            clean_caption=False,
            output_type="latent",
        ).images

    base, distance = latents(), {}
    for name, variant in VARIANTS.items():
        monkeypatch.setattr(re_ttention, "statistics", variant)
        ramp = 0.04 if name == "rho + R" else 0.0
        with pared.apply(pipe, Rettention(keep=0.0625, ramp=ramp)):
            distance[name] = float((latents() - base).square().mean().sqrt())
    assert distance["rho + R"] < distance["window"] / 2, distance
    assert distance["R"] < distance["window"] / 2, distance
    assert distance["rho"] > 0.9 * distance["window"], distance
