"""DiffFit: its paper's checks; those that need no weights come with the package, and run too."""

import copy
import inspect

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from diffusers.models.normalization import RMSNorm
from torch import nn

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention.edit import EDiT
from pared.bench import contract
from pared.bench.subjects import PipelineSubject, Sample, usual_prompts
from pared.errors import InputError
from pared.experts.multi_task_upcycling import MultiTaskUpcycling
from pared.healing import student_of
from pared.method import Conversion, stack_of
from pared.objectives.denoising import Denoising
from pared.training import TrainingSettings, train
from pared.tuning import difffit_checks
from pared.tuning.difffit import INFO, DiffFit, ScaledLinear
from pared.tuning.lora import LoRA
from pared.worlds import emoji

CHECKS = [f for name, f in inspect.getmembers(difffit_checks) if name.startswith("check_")]
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RMSNorm)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


def toy(family: str, *methods: Conversion) -> nn.Module:
    torch.manual_seed(0)
    return pared.convert(presets.build(f"toy:{family}", device="cpu"), *methods)


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """All that trains moved at random, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise.to(parameter)
    return model


def output(model: nn.Module) -> torch.Tensor:
    family = anatomy.of(model)
    generator = torch.Generator().manual_seed(1)
    return family.denoise(model, *family.example(2, 8, 8, text_tokens=8, generator=generator))


# What trains --------------------------------------------------------------------------------------


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def expected(model: nn.Module) -> set[str]:
    """The card's set by kinds of modules, where the method goes by kinds of parameters."""
    found = set()
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            norm = name == "weight" and isinstance(module, NORMS)
            added = name in ("bias", "scale_shift_table")
            if norm or added or name.startswith("gamma") or isinstance(module, nn.Embedding):
                found.add(f"{path}.{name}".removeprefix("."))
    return found


def dead(model: nn.Module) -> set[str]:
    """Parameters without an effect: see `test_only_what_is_named_trains`."""
    found = set()
    for site in anatomy.of(model).sites("self_attention", "cross_attention"):
        if site.module.norm_k is None:
            found.add(f"{site.path}.to_k.bias")
    for site in anatomy.of(model).sites("joint_attention"):
        if hasattr(site.module, "add_q_proj") and site.module.to_add_out is None:
            found |= {f"{site.path}.add_q_proj.bias", f"{site.path}.norm_added_q.weight"}
    return found


@pytest.mark.parametrize("family", INFO.families)
def test_only_what_is_named_trains(family):
    model = toy(family, DiffFit())
    assert trained(model) == expected(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        output(model).square().sum().backward()
        optimizer.step()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), f"{name} was frozen and changed"
        elif name in dead(model):
            # A key's bias adds the same to all logits of a query, which a softmax doesn't see; and
            # nobody reads the text's queries in a last block without a text output.
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-5 * largest, name
        else:
            assert parameter.grad.any(), f"no gradient reaches {name}"
            assert not torch.equal(parameter, before[name]), f"{name} didn't move"


def test_matrices_of_modulation_stay_frozen_though_called_norms():
    names = trained(toy("dit", DiffFit()))
    assert "transformer_blocks.0.norm1.linear.bias" in names
    assert "transformer_blocks.0.norm1.linear.weight" not in names


def test_norms_of_queries_and_keys_train():
    assert "transformer_blocks.0.attn.norm_k.weight" in trained(toy("sd3", DiffFit()))


def test_bitfit_is_no_locations():
    model = toy("unet", DiffFit(locations=[]))
    assert model.state_dict().keys() == toy("unet").state_dict().keys()
    assert trained(model) == {n for n, _ in model.named_parameters() if n.endswith("bias")}
    labelled = trained(toy("dit", DiffFit(locations=[])))
    tables = {name for name in labelled if not name.endswith("bias")}
    assert tables == {
        f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight" for i in range(2)
    }


def test_diffusers_dit_trains_an_embedding_per_block():
    """27 blocks more with 2 D biases of the timestep's MLP and a table of 102 rows."""
    with torch.device("meta"):
        model = presets.get("dit-xl-2").denoiser.make(num_embeds_ada_norm=101)
    pared.convert(model, DiffFit())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 832_928 + 27 * (2 + 102) * 1152


def test_share_of_parameters_is_the_papers():
    assert f"{832_928 / 675_129_632:.4%}" == "0.1234%"
    headline = next(h for h in INFO.headlines if h.key == "share-of-parameters")
    assert headline.bound >= 832_928 / 675_129_632


# Where the gammas are -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, layers",
    [
        ("dit", {"attn1.to_out.0", "ff.net.2"}),
        ("pixart", {"attn1.to_out.0", "attn2.to_out.0", "ff.net.2"}),
        ("sd3", {"attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "ff.net.2"}),
        ("unet", {"attn1.to_out.0", "attn2.to_out.0", "ff.net.2"}),
        ("flux", {"attn.to_out.0", "attn.to_add_out", "ff.net.2", "proj_out"}),
    ],
)
def test_every_residual_branch_ends_in_a_gamma(family, layers):
    model = toy(family, DiffFit(locations="blocks"))
    paths = [path for path, m in model.named_modules() if isinstance(m, ScaledLinear)]
    ends = {end for path in paths for end in layers | {"ff_context.net.2"} if path.endswith(end)}
    assert ends - {"ff_context.net.2"} == layers
    assert all(path.endswith(tuple(ends)) for path in paths)
    blocks = {block.path for block in anatomy.of(model).blocks}
    assert {b for b in blocks if any(p.startswith(f"{b}.") for p in paths)} == blocks


def test_full_has_seven_vectors_per_block_two_of_them_on_one_output():
    model = toy("dit", DiffFit())
    gammas = [n for n, _ in model.named_parameters() if ".gamma" in n and "blocks.0." in n]
    assert len(gammas) == 7
    last = model.transformer_blocks[0].attn1.to_out[0]
    x = torch.randn(3, 32)
    plain = nn.functional.linear(x, last.weight, last.bias)
    last.gamma.data.fill_(2)
    last.gamma_branch.data.fill_(3)
    torch.testing.assert_close(last(x), 6 * plain)


def test_queries_of_the_text_that_nobody_reads_get_none():
    names = toy("sd3", DiffFit()).state_dict()
    assert "transformer_blocks.1.attn.add_q_proj.gamma" in names
    assert "transformer_blocks.2.attn.add_q_proj.gamma" not in names


def test_the_products_type_is_the_layers():
    layer = ScaledLinear(nn.Linear(4, 4), ["gamma"])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16


# Identity and merging -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", INFO.families)
def test_nothing_changes_at_first(family):
    torch.testing.assert_close(
        output(toy(family, DiffFit())), output(toy(family)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("family", INFO.families)
def test_merged_it_is_of_the_bases_architecture(family, tmp_path):
    model = stirred(toy(family, DiffFit())).eval()
    weights, wanted = copy.deepcopy(model.state_dict()), output(model)
    handle = DiffFit().merge(model)
    assert model.state_dict().keys() == toy(family).state_dict().keys()
    assert not any(isinstance(m, ScaledLinear) for m in model.modules())
    assert not stack_of(model)
    # Scaling before adding up instead of after rounds differently, by 1e-6 of the size.
    size = float(wanted.detach().abs().max())
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=2e-6 * max(1, size))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(again), output(model)), "the stock class computes something else"
    handle.remove()
    assert stack_of(model) == [DiffFit()]
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert torch.equal(output(model), wanted)


def test_only_what_is_there_can_be_merged():
    model = toy("dit", DiffFit())
    with pytest.raises(
        InputError, match=r"^difffit:locations=blocks can't be merged .* carries difffit\.$"
    ):
        DiffFit(locations="blocks").merge(model)
    with pytest.raises(InputError, match="this one carries nothing"):
        DiffFit().merge(toy("dit"))


# New classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [f for f in contract.CONVERSIONS if f is not contract.contract_compile]
)
def test_new_classes_keep_the_contract(function):
    function(DiffFit(classes=3), "dit")


def test_new_classes_train_and_are_dropped_as_the_model_does():
    model = toy("dit", DiffFit(classes=3)).train()
    family = anatomy.of(model)
    latents, timestep, _ = family.example(batch=3)
    for labels in ([0, 1, 2], [3, 3, 3]):
        for _ in range(20):  # one label in ten is dropped, at random
            condition = {"label": torch.tensor(labels)}
            assert family.denoise(model, latents, timestep, condition).isfinite().all()


def test_new_classes_are_the_same_in_all_blocks():
    model = toy("dit", DiffFit(classes=3))
    first, second = (model.get_submodule(p).weight for p in anatomy.of(model).label_tables)
    assert torch.equal(first[:3], second[:3])


def class_pipeline(*methods: Conversion, **config: int) -> DiTPipeline:
    torch.manual_seed(0)
    preset = presets.get("toy:dit")
    model = pared.convert(preset.denoiser.make(**config), *methods).eval()
    pipe = DiTPipeline(model, presets.build("toy:dit", "cpu", component="vae"), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def painted(pipe: DiTPipeline, *labels: int) -> torch.Tensor:
    seed = torch.Generator().manual_seed(0)
    return pipe(list(labels), generator=seed, num_inference_steps=2, output_type="pt").images


@pytest.mark.parametrize("known", [10, 3])  # as many as before: a saved model, loaded again
def test_the_stock_pipeline_guides_new_classes_by_the_null_class(known, tmp_path):
    pipe = class_pipeline(DiffFit(classes=3), num_embeds_ada_norm=known)
    tables = [pipe.transformer.get_submodule(p) for p in anatomy.of(pipe.transformer).label_tables]
    seen = []
    tables[0].register_forward_hook(lambda module, args, rows: seen.append(rows))
    picture = painted(pipe, 1)
    for rows in seen:
        assert torch.equal(rows, tables[0].weight[[1, 3]])
    with torch.no_grad():
        for table in tables:
            table.weight[3] += 1
    assert not torch.equal(painted(pipe, 1), picture)
    pared.save(pipe, tmp_path / "pipe")
    again = pared.load(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(painted(again, 1), painted(pipe, 1))
    # Other classes that aren't there stay mistakes.
    with pytest.raises(IndexError):
        painted(pipe, 4)


@pytest.mark.parametrize("methods, known", [((), 10), ((DiffFit(classes=1001),), 10)])
def test_guidance_by_another_class_is_refused(methods, known):
    pipe = class_pipeline(*methods, num_embeds_ada_norm=known)
    with pytest.raises(InputError, match=r"guides by class 1000, .* give a guidance scale of 1"):
        PipelineSubject(pipe, [Sample(1, 0)], {})
    subject = PipelineSubject(pipe, [Sample(1, 0)], {"guidance_scale": 1.0})
    assert subject.run(steps=1).isfinite().all()
    guided = PipelineSubject(class_pipeline(DiffFit(classes=3)), [Sample(1, 0)], {})
    with pytest.raises(InputError, match="guides by class 1000"):
        guided.with_model(pipe.transformer)


def test_benches_paint_classes_that_there_are():
    assert usual_prompts(class_pipeline(DiffFit(classes=3))) == (0, 1, 2)
    assert usual_prompts(class_pipeline(DiffFit(classes=101))) == (0, 25, 50, 75)
    assert usual_prompts(class_pipeline(num_embeds_ada_norm=1000)) == (207, 360, 387, 974)


def test_models_without_classes_refuse_new_ones():
    model = presets.build("toy:pixart", device="cpu")
    before = dict(model.named_modules())
    with pytest.raises(InputError, match="pixart model takes text, mask, and no classes"):
        pared.convert(model, DiffFit(classes=3))
    assert dict(model.named_modules()) == before


# With other methods -------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [(EDiT(), DiffFit()), (DiffFit(), EDiT())])
def test_it_goes_with_converted_attentions(methods):
    model = toy("pixart", *methods)
    assert "transformer_blocks.0.attn1.to_k.gamma" in model.state_dict()
    assert "transformer_blocks.0.attn1.processor.key_compressor.weight" in model.state_dict()
    # The attention's new form computes with the scaled layers.
    before = output(model)
    model.transformer_blocks[0].attn1.to_k.gamma.data.mul_(-1)
    assert not torch.equal(output(model), before)


@pytest.mark.parametrize("method", [DiffFit(), DiffFit(locations=["fc2"])], ids=Conversion.spec)
@pytest.mark.parametrize("rebuilt_first", [True, False])
def test_it_is_refused_where_feed_forwards_are_rebuilt(method, rebuilt_first):
    methods = [MultiTaskUpcycling(), method] if rebuilt_first else [method, MultiTaskUpcycling()]
    with pytest.raises(InputError, match=r"replaces transformer_blocks\.0\.ff, which"):
        toy("pixart", *methods)
    with pytest.raises(InputError, match=r"replaces transformer_blocks\.0\.ff, which"):
        pared.convert(toy("pixart", methods[0]), methods[1])


def test_it_is_refused_on_layers_that_are_wrapped_already():
    pytest.importorskip("peft")
    with pytest.raises(InputError, match=r"difffit replaces \S+to_q, which lora already replaces"):
        toy("dit", LoRA(), DiffFit())


# Settings -----------------------------------------------------------------------------------------


def test_specs():
    assert pared.parse("difffit:locations=[]") == DiffFit(locations=[])
    assert pared.parse("difffit:locations=blocks+qkv").locations == "blocks+qkv"
    assert pared.parse(DiffFit(locations=["q", "fc2"]).spec()).locations == ("q", "fc2")


@pytest.mark.parametrize(
    "value, message",
    [
        ("all", "give one of blocks, blocks\\+qkv, full, or a list of locations"),
        (3, "give one of blocks"),
        (["q", "mlp"], "there is no location 'mlp'; there are attention_branch, .*, fc2"),
        (["q", "q"], "a location is there twice"),
    ],
)
def test_bad_locations(value, message):
    with pytest.raises(InputError, match=f"difffit: locations=.* doesn't work: {message}"):
        DiffFit(locations=value)


# Learning -----------------------------------------------------------------------------------------


class Pictures:
    """Pictures as latents of one class."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"latents": self.images[indices], "label": torch.zeros(len(indices), dtype=int)}

    def identity(self) -> str:
        return f"pictures {self.images.double().sum()}"


def changed(images: torch.Tensor) -> torch.Tensor:
    """The other domain: mirrored, blurred, inverted, half the contrast."""
    return -0.5 * nn.functional.avg_pool2d(images.flip(-1), 3, 1, 1)


def small_dit() -> nn.Module:
    torch.manual_seed(0)
    config = {"sample_size": 8, "num_layers": 4, "in_channels": 3, "out_channels": 3}
    config |= {"num_attention_heads": 3, "num_embeds_ada_norm": 1}
    return presets.get("toy:dit").denoiser.make(**config)


def tuned(model: nn.Module, data: Pictures, folder, steps: int, rate: float, names) -> nn.Module:
    settings = TrainingSettings(
        steps=steps, learning_rate=rate, batch_size=32, trainable=names, checkpoint_every=steps
    )
    train(model, Denoising(), data, settings, folder)
    return model


@torch.no_grad()
def loss(model: nn.Module, data: Pictures) -> float:
    generator = torch.Generator().manual_seed(5)
    return float(Denoising()(model, data.batch(torch.arange(256), generator), generator)["task"])


@pytest.mark.slow
def test_learning_ranks_as_in_the_paper(tmp_path):
    """Better than BitFit at its rate, near full fine-tuning, and far worse at the latter's rate."""
    images = emoji.load("train", size=8).images.float() / 127.5 - 1
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    source, target = Pictures(images[256:]), Pictures(changed(images[256:]))
    held = Pictures(changed(images[:256]))
    base = tuned(small_dit(), source, tmp_path / "base", 600, 3e-3, ("*",))
    losses = {"frozen": loss(base, held)}
    runs = {
        "full": (None, 1e-3),
        "difffit": (DiffFit(), 1e-2),
        "bitfit": (DiffFit(locations=[]), 1e-2),
        "difffit slow": (DiffFit(), 1e-3),
    }
    for name, (method, rate) in runs.items():
        model = student_of(base)
        names: tuple[str, ...] = ("*",)
        if method is not None:
            names = method.trainable(anatomy.of(pared.convert(model, method)))
        losses[name] = loss(tuned(model, target, tmp_path / name, 250, rate, names), held)
    assert losses["difffit"] < losses["bitfit"] < losses["frozen"], losses
    assert losses["difffit slow"] > 1.2 * losses["difffit"], losses
    assert losses["full"] < 1.1 * losses["difffit"], losses


def test_healing_trains_only_the_adapter(tmp_path):
    teacher = toy("dit")
    student = pared.convert(student_of(teacher), DiffFit())
    before = {n: p.clone() for n, p in student.named_parameters()}
    data = Pictures(torch.randn(8, 4, 16, 16))
    told = []
    pared.heal(
        student, teacher, data, tmp_path, steps=2, batch_size=4, learning_rate=1e-3,
        on_step=lambda step, terms: told.append(set(terms)),
    )  # fmt: skip
    assert told == [{"task"}] * 2
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= trained(student)
