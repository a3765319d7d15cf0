"""MTU: its card's checks; those that need no weights come with the package and run here too."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.bench import costs
from pared.errors import InputError
from pared.experts import multi_task_upcycling_checks
from pared.experts.folding import fold
from pared.experts.multi_task_upcycling import MultiTaskUpcycling, add_task, routes, select
from pared.experts.task_layers import RoutedFeedForward, TaskConv
from pared.healing import student_of
from pared.method import stack_of
from pared.objectives.denoising import Denoising
from pared.training.loop import freeze_all_but
from tests.recipes import pipelines

CHECKS = [
    f for name, f in inspect.getmembers(multi_task_upcycling_checks) if name.startswith("check_")
]
TASKS = MultiTaskUpcycling().tasks


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


def converted(preset="toy:unet", stirred=0.0, **settings) -> nn.Module:
    torch.manual_seed(0)
    model = pared.convert(presets.build(preset, device="cpu"), MultiTaskUpcycling(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(stirred * torch.randn_like(parameter))
    return model


def example(model, batch=4):
    """Latents, timestep, and a condition with one sample of each task."""
    generator = torch.Generator().manual_seed(1)
    latents, timestep, condition = anatomy.of(model).example(batch, 8, 8, 8, generator)
    condition["source"] = torch.randn(latents.shape, generator=generator)
    condition["task"] = torch.arange(batch) % len(TASKS)
    return latents, timestep, condition


def denoised(model, *call):
    with torch.no_grad():
        return anatomy.of(model).denoise(model, *call)


# What it costs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "layers", "feed_forward", "biases", "norm"),
    [
        ("sd1.5", 16, 148_797_120, 37_440, 24_960),
        ("sdxl", 70, 1_229_548_800, 249_600, 166_400),
    ],
)
def test_full_size_parameters(preset, layers, feed_forward, biases, norm):
    model = presets.build(preset)
    before = sum(p.numel() for p in model.parameters())
    sites = anatomy.of(model).sites("feed_forward")
    assert len(sites) == layers
    assert sum(p.numel() for s in sites for p in s.module.parameters()) == feed_forward
    pared.convert(model, MultiTaskUpcycling())
    sites = anatomy.of(model).sites("feed_forward")
    experts = sum(w.numel() for s in sites for i in range(4) for w in s.module.expert(i).values())
    assert experts - feed_forward == biases
    # One norm per task, three more than before; an input of 320 channels with a 3x3 kernel; four
    # embeddings; and in each layer a router of 128 -> 128 -> 4.
    inputs = 320 * (9 * 4 * 6 + 3)
    routers = layers * (129 * 128 + 129 * 4)
    after = sum(p.numel() for p in model.parameters())
    assert after - before == biases + 3 * norm + inputs + 4 * 128 + routers
    again = pared.convert(presets.build(preset), MultiTaskUpcycling())
    again.load_state_dict(model.state_dict(), strict=True, assign=True)
    for task, channels in zip(TASKS, (4, 8, 8, 8), strict=True):
        folded = fold(model, task)
        assert folded.config.in_channels == channels
        assert sum(p.numel() for p in folded.parameters()) == before + 320 * 9 * (channels - 4)


def test_full_size_multiply_adds():
    model = presets.build("sd1.5")
    family = anatomy.of(model)
    call = family.example()

    def macs():
        counted = costs.count(
            model, costs.BySite(anatomy.of(model)), lambda: family.denoise(model, *call)
        )
        return counted[costs.FEED_FORWARD].macs, sum(cost.macs for cost in counted.values())

    feed_forward, whole = macs()
    assert feed_forward / 1e9 == pytest.approx(76.8, abs=0.05)
    assert whole / 1e9 == pytest.approx(401.6, abs=0.05)
    pared.convert(model, MultiTaskUpcycling())
    routed, routed_whole = macs()
    # The experts cost what the layer did; a router 128 -> 128 -> 4 and the mix of four biases, once
    # for a call, are less than a millionth of the model.
    widths = [site.module.out.out_features for site in anatomy.of(model).sites("feed_forward")]
    assert routed - feed_forward == sum(128 * 128 + 128 * 4 + 4 * d for d in widths)
    assert routed_whole - whole == routed - feed_forward
    assert routed_whole / whole < 1.000001


@pytest.mark.parametrize("preset", ["toy:unet", "toy:pixart", "toy:sd3"])
def test_a_folded_model_costs_what_the_base_does(preset):
    base = presets.build(preset)
    model = pared.convert(presets.build(preset), MultiTaskUpcycling())
    family = anatomy.of(base)
    call = family.example()

    def flops(model):
        with FlopCounterMode(display=False) as counter:
            family.denoise(model, *call)
        return counter.get_total_flops()

    folded = fold(model, "text-to-image")
    assert flops(folded) == flops(base) < flops(model)
    assert {n: w.shape for n, w in folded.state_dict().items()} == {
        n: w.shape for n, w in base.state_dict().items()
    }


# What is learnt ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["toy:unet", "toy:pixart", "toy:sd3"])
def test_trained_are_experts_routers_embeddings_norms_and_inputs_alone(preset):
    model = converted(preset)
    family = anatomy.of(model)
    before = dict(presets.build(preset).named_parameters())
    freeze_all_but(model, MultiTaskUpcycling().trainable(family))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    sites = family.sites("feed_forward")
    norms = [family.norm_before(s) for s in sites] if preset == "toy:unet" else []
    places = ("task_embedding", family.input_layer, *(s.path for s in sites), *norms)
    assert trained == {n for n in dict(model.named_parameters()) if n.startswith(places)}
    frozen = {n: p for n, p in model.named_parameters() if n not in trained}
    assert frozen.keys() <= before.keys()
    assert not any("attn" in n or "time" in n for n in trained)


def test_a_step_gives_each_task_routes_of_its_own():
    model = converted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    call = example(model)
    (anatomy.of(model).denoise(model, *call) - call[0]).square().mean().backward()
    optimizer.step()
    tables = routes(model)
    for w in tables.values():
        torch.testing.assert_close(w.sum(-1), torch.ones(len(w)))
    for task in TASKS[1:]:
        assert not torch.allclose(tables[task], tables[TASKS[0]], atol=1e-7, rtol=0)


def test_routes_know_nothing_of_latents_and_time():
    model = converted(stirred=0.05)
    seen = []
    layer = anatomy.of(model).sites("feed_forward")[0].module
    layer.router.register_forward_hook(lambda module, args, output: seen.append(output))
    latents, timestep, condition = example(model)
    denoised(model, latents, timestep, condition)
    denoised(model, -2 * latents, timestep // 3, condition)
    assert torch.equal(*seen)


def test_one_expert_is_fine_tuning_with_task_norms():
    model = converted(experts=1, stirred=0.05)
    assert all((w == 1).all() for w in routes(model).values())
    call = example(model)
    anatomy.of(model).denoise(model, *call).square().mean().backward()
    for site in anatomy.of(model).sites("feed_forward"):
        assert all(not p.grad.any() for p in site.module.router.parameters())
        assert site.module.out.weight.grad.any()
    assert not model.task_embedding.weight.grad.any()


class Mixed:
    """Random latents with a picture, equally many rows of each task in every two batches."""

    def __init__(self, model):
        family = anatomy.of(model)
        self.entries = family.example(16, 8, 8, 8, torch.Generator().manual_seed(0))

    def __len__(self):
        return 16

    def batch(self, indices, generator):
        latents, _, condition = self.entries
        rows = {name: value[indices] for name, value in condition.items()}
        picture = latents.flip(-1)[indices]
        return rows | {"latents": latents[indices], "source": picture, "task": indices % 4}

    def identity(self):
        return "mixed"


def test_healing_learns_all_tasks_from_their_data(tmp_path):
    original = presets.build("toy:pixart", device="cpu")
    torch.manual_seed(0)
    student = pared.convert(student_of(original), MultiTaskUpcycling())
    before = copy.deepcopy(student.state_dict())
    losses = []
    run = pared.heal(
        student, original, Mixed(original), tmp_path, task=Denoising("v"),
        on_step=lambda step, terms: losses.append(terms), steps=12, batch_size=8,
        learning_rate=3e-3,
    )  # fmt: skip
    assert run.finished and list(losses[0]) == ["task"]
    assert sum(x["task"] for x in losses[-4:]) < sum(x["task"] for x in losses[:4])
    moved = {n for n, w in student.state_dict().items() if not torch.equal(w, before[n])}
    kept = set(presets.build("toy:pixart").state_dict()) & set(before) - {
        "pos_embed.proj.weight", "pos_embed.proj.bias"
    }  # fmt: skip
    assert not moved & kept
    rows = (student.task_embedding.weight - before["task_embedding.weight"]).abs().amax(1)
    assert (rows > 0).all()
    # The tasks of the last batch are forgotten: other calls and saving get the first one.
    latents, timestep, condition = anatomy.of(student).example(2, 8, 8, 8)
    text = {"encoder_hidden_states": condition["text"], "encoder_attention_mask": condition["mask"]}
    with torch.no_grad():
        plain = student(latents, timestep=timestep, **text, return_dict=False)[0][:, :4]
    condition["task"] = torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(
        denoised(student, latents, timestep, condition), plain, rtol=1e-4, atol=1e-5
    )
    pared.load(pared.save(student, tmp_path / "model"), verify=True)


# How it is called -------------------------------------------------------------------------------


def painted(pipeline):
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    if "Sigma" in type(pipeline).__name__:
        size["use_resolution_binning"] = False
    return pipeline("a red fox", generator=torch.Generator().manual_seed(0), **size).images


def assert_near(got, wanted):
    """Equal but for rounding, which two steps with guidance spread over all numbers."""
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("family", ["unet", "pixart", "sd3"])
def test_stock_pipelines_paint_as_before(family):
    pipeline = pipelines.pipeline(family)
    pipeline.set_progress_bar_config(disable=True)
    wanted = painted(pipeline)
    torch.manual_seed(0)
    pared.convert(pipeline, MultiTaskUpcycling())
    assert_near(painted(pipeline), wanted)
    select(pipeline, "edit")
    with pytest.raises(InputError, match="the task 'edit' reads the latents of a picture, "):
        painted(pipeline)
    select(pipeline, "text-to-image")
    assert_near(painted(pipeline), wanted)


def test_a_folded_model_edits_in_the_stock_pipeline():
    from diffusers import StableDiffusionInstructPix2PixPipeline

    parts = pipelines.pipeline("unet").components
    torch.manual_seed(0)
    model = pared.convert(parts["unet"], MultiTaskUpcycling())
    parts["unet"] = fold(model, "edit", parts["vae"].config.scaling_factor)
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made = pipeline("make it blue", picture, num_inference_steps=2, output_type="pt").images
    assert made.shape == (1, 3, 64, 64)


def test_a_folded_model_may_take_pictures_on_another_scale():
    model = converted(stirred=0.05)
    latents, timestep, condition = example(model)
    wanted = denoised(fold(model, "edit"), latents, timestep, condition)
    condition["source"] = condition["source"] / 0.18
    got = denoised(fold(model, "edit", 0.18), latents, timestep, condition)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_selected_task_is_that_of_the_condition():
    model = converted(stirred=0.05)
    latents, timestep, condition = example(model)
    condition["task"] = torch.full((4,), 2)
    wanted = denoised(model, latents, timestep, condition)
    del condition["task"]
    assert not torch.allclose(denoised(model, latents, timestep, condition), wanted)
    select(model, "upscale")
    got = denoised(model, latents, timestep, condition)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_task_is_added_and_saved(tmp_path):
    model = converted(stirred=0.05, tasks=("text-to-image", "upscale"))
    add_task(model, "edit")
    assert stack_of(model)[0].tasks == ("text-to-image", "upscale", "edit")
    again = pared.load(pared.save(model.eval(), tmp_path / "model"))
    call = example(model)
    call[2]["task"] = torch.tensor([0, 1, 2, 1])
    assert torch.equal(denoised(again, *call), denoised(model, *call))
    with pytest.raises(InputError, match="was taught 'edit' already"):
        add_task(model, "edit")


def test_checkpointed_gradients_are_those_of_the_call():
    model = converted("toy:pixart", stirred=0.05).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        anatomy.of(model).denoise(model, *example(model)).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def test_compiled_calls_follow_the_task():
    model = converted("toy:pixart", stirred=0.05).eval()
    latents, timestep, condition = example(model)
    wanted = denoised(model, latents, timestep, condition)
    torch._dynamo.reset()
    try:
        model.compile(backend="eager", fullgraph=True)
        got = denoised(model, latents, timestep, condition)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
        condition["task"] = condition["task"].flip(0)
        assert not torch.allclose(denoised(model, latents, timestep, condition), wanted)
    finally:
        torch._dynamo.reset()


def test_half_precision_routes_in_full():
    model = converted(stirred=0.05)
    layer = anatomy.of(model).sites("feed_forward")[0].module
    with torch.autocast("cpu", torch.bfloat16):
        w = layer.routes(torch.arange(4))
    assert w.dtype == torch.float32
    torch.testing.assert_close(w, layer.routes(torch.arange(4)), rtol=0, atol=0)
    assert layer.to(torch.bfloat16).experts == 4
    model.to(torch.bfloat16)
    assert layer.routes(torch.arange(4)).dtype == torch.float32


def test_it_goes_with_other_conversions_and_folds_beside_them():
    model = converted(stirred=0.05)
    pared.convert(model, pared.parse("edit"))
    folded = fold(model, "inpaint")
    assert [m.info.slug for m in stack_of(folded)] == ["edit"]
    call = example(model)
    call[2]["task"] = torch.full((4,), 3)
    torch.testing.assert_close(
        denoised(folded, *call), denoised(model, *call), rtol=1e-4, atol=1e-5
    )


# What it refuses --------------------------------------------------------------------------------


def test_folding_goes_one_way():
    model = converted()
    for task in ("text-to-image", "edit"):
        folded = fold(model, task)
        with pytest.raises(InputError, match="carries no multi-task-upcycling; convert it first"):
            fold(folded, task)
        with pytest.raises(InputError, match=f"folded for '{task}', and folding goes one way"):
            pared.convert(folded, MultiTaskUpcycling())
    del folded.pared_folded  # as it is when the model comes from a folder
    with pytest.raises(InputError, match="reads 8 channels and predicts 4"):
        pared.convert(folded, MultiTaskUpcycling())


def test_a_folded_model_shares_no_weights():
    model = converted()
    folded = fold(model, "edit")
    before = denoised(model, *example(model))
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert torch.equal(denoised(model, *example(model)), before)


def test_tasks_that_a_model_does_not_know():
    model = converted(tasks=("text-to-image", "edit"))
    for use in (select, fold):
        with pytest.raises(InputError, match=r"no task 'edits'; did you mean edit\?"):
            use(model, "edits")
        with pytest.raises(InputError, match="was not taught 'inpaint', it knows text-to-image"):
            use(model, "inpaint")
        with pytest.raises(InputError, match="carries no multi-task-upcycling"):
            use(presets.build("toy:unet"), "edit")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": torch.tensor([0, 1])}, "2 tasks for 4 samples"),
        ({"source": torch.zeros(4, 2, 8, 8)}, "reads 4 channels of noised latents, or 8"),
    ],
)
def test_calls_that_do_not_fit(change, words):
    model = converted()
    latents, timestep, condition = example(model)
    with pytest.raises(InputError, match=words):
        denoised(model, latents, timestep, condition | change)


def test_a_picture_can_not_be_left_out():
    model = converted()
    latents, timestep, condition = example(model)
    del condition["source"]
    with pytest.raises(InputError, match="the task 'edit' reads the latents of a picture"):
        denoised(model, latents, timestep, condition)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts": 0}, "experts=0"),
        ({"tasks": ()}, "tasks="),
        ({"tasks": ("paint",)}, "no task 'paint'"),
        ({"tasks": ("edit", "upscale")}, "begin with text-to-image"),
        ({"tasks": ("text-to-image", "edit", "edit")}, "edit is there twice"),
        ({"split": "halves"}, "'contiguous' or 'random'"),
        ({"top_k": 1}, "no setting 'top_k'"),
    ],
)
def test_bad_settings_say_what_is_right(settings, words):
    with pytest.raises(InputError, match=words):
        MultiTaskUpcycling(**settings)


def test_experts_must_divide_the_hidden_units():
    model = presets.build("toy:unet")
    with pytest.raises(InputError, match="experts=3 doesn't divide the 128 hidden units of down_"):
        pared.convert(model, MultiTaskUpcycling(experts=3))
    assert not stack_of(model) and not hasattr(model, "task_embedding")


@pytest.mark.parametrize(
    ("preset", "words"),
    [("toy:dit", "this model takes label"), ("toy:flux", "x_embedder is no convolution")],
)
def test_models_without_words_or_latent_channels(preset, words):
    with pytest.raises(InputError, match=words):
        pared.convert(presets.build(preset), MultiTaskUpcycling())


def test_layers_are_what_they_are_called():
    model = converted()
    family = anatomy.of(model)
    assert isinstance(model.conv_in, TaskConv)
    assert all(isinstance(s.module, RoutedFeedForward) for s in family.sites("feed_forward"))
    assert model.config.in_channels == 4
