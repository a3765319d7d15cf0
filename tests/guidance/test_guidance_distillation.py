"""Guidance distillation: its paper's checks, the stock pipelines, and that healing heals."""

import copy
import inspect

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import pared
from pared import anatomy, recipe
from pared.anatomy import presets
from pared.errors import InputError
from pared.guidance import guidance_distillation_checks
from pared.guidance.guidance_distillation import one_pass
from pared.healing import student_of
from pared.nn.diffusion import guidance_features
from pared.objectives.denoising import Denoising
from pared.objectives.guided import WEIGHT, Guided
from pared.worlds.datasets import LatentData
from tests.recipes.pipelines import pipeline

CHECKS = [
    f for name, f in inspect.getmembers(guidance_distillation_checks) if name.startswith("check_")
]
# Those that take the weight in through an MLP of pared's own.
OTHERS = ("pixart", "sd3", "dit")


def converted(family: str):
    """A toy whose new weights have moved, so that w counts."""
    torch.manual_seed(0)
    plain = presets.build(f"toy:{family}", device="cpu")
    old = dict(plain.named_parameters())
    model = pared.convert(copy.deepcopy(plain), pared.GuidanceDistillation())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in old:
                parameter.normal_(std=0.2)
    return model


def example(model, batch: int = 1):
    seed = torch.Generator().manual_seed(1)
    return anatomy.of(model).example(batch, 8, 8, text_tokens=8, generator=seed)


@torch.no_grad()
def output(model, w: torch.Tensor | None = None) -> torch.Tensor:
    latents, timestep, condition = example(model)
    condition = condition if w is None else condition | {WEIGHT: w}
    return anatomy.of(model).denoise(model, latents, timestep, condition)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


# U-Nets: diffusers' own input ---------------------------------------------------------------------


def test_features_are_those_of_the_stock_pipelines():
    w = torch.tensor([0.0, 0.3, 6.5, 13.999])
    wanted = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    assert torch.equal(guidance_features(w, 256), wanted)


def test_a_stock_pipeline_calls_the_unet_once_per_step_with_the_scale():
    pipe = pipeline("unet")
    pipe.unet = converted("unet")
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args[0], kwargs["timestep_cond"])),
        with_kwargs=True,
    )
    pictures = {}
    for scale in (1.0, 7.5):
        calls.clear()
        pictures[scale] = pipe(
            "a fox", height=64, width=64, num_inference_steps=3, guidance_scale=scale,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip
        assert [len(latents) for latents, _ in calls] == [1, 1, 1]
        assert torch.equal(calls[0][1], guidance_features(torch.tensor([scale - 1]), 256))
    assert not torch.equal(*pictures.values())


@torch.no_grad()
def test_denoise_gives_the_unet_what_the_pipeline_gives_it():
    model = converted("unet")
    latents, timestep, condition = example(model)
    scale = 4.5
    features = StableDiffusionPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1]), embedding_dim=256
    )
    wanted = model(latents, timestep, condition["text"], timestep_cond=features).sample
    assert torch.equal(output(model, torch.tensor([scale - 1])), wanted)


@pytest.mark.parametrize("name", ["unet", "sdxl"])
def test_a_saved_unet_opens_in_plain_diffusers_and_in_pared(tmp_path, name):
    model = converted(name)
    pared.save(model, tmp_path / "model")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "model").eval()
    again = pared.load(tmp_path / "model")
    assert plain.config.time_cond_proj_dim == 256
    w = torch.tensor([3.0])
    wanted = output(model, w)
    assert torch.equal(output(plain, w), wanted)
    assert torch.equal(output(again, w), wanted)
    assert again.pared_stack == [pared.GuidanceDistillation()]


def test_a_unet_that_has_the_input_keeps_its_weights():
    config = presets.get("toy:unet").denoiser.config | {"time_cond_proj_dim": 64}
    model = UNet2DConditionModel(**config).eval()
    before = output(model, torch.tensor([2.0]))
    pared.convert(model, pared.GuidanceDistillation())
    assert model.config.time_cond_proj_dim == 64
    assert torch.equal(output(model, torch.tensor([2.0])), before)


# Other families: the weight put in by hand --------------------------------------------------------


@pytest.mark.parametrize("family", ("unet", *OTHERS))
def test_what_is_put_in_by_hand_holds_where_nothing_is_given(family):
    model = converted(family)
    none, three = output(model), output(model, torch.tensor([3.0]))
    assert torch.equal(output(model, torch.tensor([0.0])), none)
    assert not torch.equal(three, none)
    anatomy.of(model).input(WEIGHT).value = torch.tensor(3.0)
    assert torch.equal(output(model), three)
    assert torch.equal(output(model, torch.tensor([0.0])), none)
    anatomy.of(model).input(WEIGHT).value = None
    assert torch.equal(output(model), none)


def test_a_stock_pipeline_of_another_family_reads_what_was_put_in():
    pipe = pipeline("pixart")
    pipe.transformer = converted("pixart")
    pipe.set_progress_bar_config(disable=True)

    def paint():
        return pipe(
            "a fox", height=64, width=64, num_inference_steps=2, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0), output_type="latent",
            use_resolution_binning=False, max_sequence_length=12,
        ).images  # fmt: skip

    plain = paint()
    anatomy.of(pipe.transformer).input(WEIGHT).value = torch.tensor([3.0])
    guided = paint()
    assert not torch.equal(guided, plain)
    assert torch.equal(guided, paint())


def test_the_scale_of_a_call_becomes_the_weight_where_the_pipeline_does_not_know_it():
    pipe = pipeline("sd3")
    assert one_pass(pipe, guidance_scale=3.0) == {"guidance_scale": 3.0}
    pipe.transformer = converted("sd3")
    assert one_pass(pipe, num_inference_steps=4) == {"num_inference_steps": 4, "guidance_scale": 1}
    weight = anatomy.of(pipe.transformer).input(WEIGHT)
    assert weight.value == 6.0  # the pipeline's own scale is 7
    assert one_pass(pipe, guidance_scale=3.0) == {"guidance_scale": 1.0} and weight.value == 2.0
    pipe = pipeline("unet")
    pipe.unet = converted("unet")
    assert one_pass(pipe, guidance_scale=3.0) == {"guidance_scale": 3.0}


@pytest.mark.parametrize("family", ("unet", *OTHERS))
def test_a_copy_reads_its_own_weight(family):
    model = converted(family)
    twin = copy.deepcopy(model)
    anatomy.of(twin).input(WEIGHT).value = torch.tensor([5.0])
    assert torch.equal(output(model), output(model, torch.tensor([0.0])))
    assert torch.equal(output(twin), output(model, torch.tensor([5.0])))


def test_checkpointed_blocks_find_the_weight_when_they_run_again():
    model = converted("dit").requires_grad_(True)
    latents, timestep, condition = example(model, batch=2)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        condition = condition | {WEIGHT: torch.tensor([1.0, 9.0])}
        anatomy.of(model).denoise(model, latents, timestep, condition).square().sum().backward()
        embedding = model.transformer_blocks[0].norm1.emb.timestep_embedder.guidance
        gradients.append(embedding.linear_1.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


def test_a_batch_needs_as_many_weights():
    model = converted("pixart")
    latents, timestep, condition = example(model, batch=3)
    with pytest.raises(InputError, match="2 numbers were given for a batch of 3"):
        anatomy.of(model).denoise(
            model, latents, timestep, condition | {WEIGHT: torch.tensor([1.0, 2.0])}
        )


# Cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ("unet", *OTHERS))
def test_a_guided_step_costs_half(family):
    """Two passes of the teacher against one of the student, with its share for w."""

    def flops(model, batch: int) -> int:
        side = 16 if family == "dit" else 32
        call = anatomy.of(model).example(batch, side, side)
        with FlopCounterMode(display=False) as counter:
            anatomy.of(model).denoise(model, *call)
        return counter.get_total_flops()

    teacher = presets.build(f"toy:{family}")
    student = pared.convert(presets.build(f"toy:{family}"), pared.GuidanceDistillation())
    ratio = flops(student, 1) / flops(teacher, 2)
    assert 0.5 < ratio < 0.51


def test_new_parameters_at_full_size():
    for name, wanted in (
        ("sd1.5", 256 * 320),
        ("pixart-sigma", 256 * 1152 + 1152 + 1152**2 + 1152),
    ):
        model = presets.build(name)
        before = sum(p.numel() for p in model.parameters())
        pared.convert(model, pared.GuidanceDistillation())
        assert sum(p.numel() for p in model.parameters()) - before == wanted


# Refusals -----------------------------------------------------------------------------------------


def test_flux_is_refused_with_its_reason():
    with pytest.raises(InputError, match="takes its guidance in as an input"):
        pared.convert(presets.build("toy:flux"), pared.GuidanceDistillation())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("guidance-distillation:w_min=-1", "greater than or equal to 0"),
        ("guidance-distillation:w_min=5,w_max=2", "w_min=5.0 is above w_max=2.0"),
        ("guidance-distillation:weighting=snr", "'velocity' or 'truncated_snr'"),
    ],
)
def test_bad_settings_say_what_is_right(spec, words):
    with pytest.raises(InputError, match=words):
        pared.parse(spec)


def test_two_ranges_of_weights_clash():
    model = pared.convert(presets.build("toy:pixart"), pared.GuidanceDistillation())
    with pytest.raises(InputError, match="already replaces"):
        pared.convert(model, pared.GuidanceDistillation(w_max=4.0))


# Healing ------------------------------------------------------------------------------------------


def data(model, count: int = 64) -> LatentData:
    latents, _, condition = anatomy.of(model).example(
        count, 8, 8, text_tokens=4, generator=torch.Generator().manual_seed(2)
    )
    null = {name: torch.zeros_like(entry[0]) for name, entry in condition.items()}
    return LatentData(latents, torch.full_like(latents, 0.01), condition, null, drop=0.0)


def error_at(student, teacher, held: LatentData, w: float) -> float:
    """Error against the teacher guided by `w`."""
    objective = Guided(w, w, task=Denoising("v"), null=held.empty).bind(student, teacher)
    batch = held.batch(torch.arange(len(held)), torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(objective(student.eval(), batch, torch.Generator().manual_seed(3))["guided"])


def test_healing_brings_a_unet_nearer_to_its_guided_teacher(tmp_path):
    torch.manual_seed(0)
    teacher = presets.build("toy:unet", device="cpu")
    with torch.no_grad():  # fresh weights hardly listen to the prompt
        for site in anatomy.of(teacher).sites("cross_attention"):
            site.module.to_out[0].weight.mul_(8)
    held = data(teacher)
    student = pared.convert(student_of(teacher), pared.GuidanceDistillation(w_max=4.0))
    before = error_at(student, teacher, held, 3.0)
    run = pared.heal(
        student, teacher, held, tmp_path, task=Denoising("v"),
        steps=60, batch_size=32, learning_rate=1e-3,
    )  # fmt: skip
    assert run.finished
    assert error_at(student, teacher, held, 3.0) < 0.6 * before
    moved = student.time_embedding.cond_proj.weight
    assert moved.abs().sum() > 0


RECIPE = """
name = "guided"
[model]
from = "PIPE"
methods = ["guidance-distillation:w_max=4"]
[data]
source = "PHOTOS"
kind = "latents"
held = HELD
[objective]
name = "guided"
settings = { w_max = 4.0 }
[[stages]]
size = 64
training = { steps = 2, batch_size = 2 }
"""


@pytest.mark.parametrize("held", ["true", "false"])
def test_a_recipe_heals_a_pipeline(tmp_path, held):
    pipeline("unet").save_pretrained(tmp_path / "teacher")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((80, 80), 60).save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"cat face {number}")
    text = RECIPE.replace("PIPE", str(tmp_path / "teacher")).replace("HELD", held)
    (tmp_path / "guided.toml").write_text(text.replace("PHOTOS", str(tmp_path / "photos")))
    recipe.run(recipe.read(tmp_path / "guided.toml"), tmp_path / "out")
    again = pared.load(tmp_path / "out" / "model")
    assert again.unet.time_embedding.cond_proj.weight.any()
