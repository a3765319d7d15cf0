"""The bill: published figures, sums and shapes, and that nothing it is given changes."""

import csv
import io
import json
from functools import cache, partial

import diffusers
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention.edit import EDiT
from pared.bench import bill_tables, costs
from pared.bench.bill import Order, bill
from pared.bench.metering import count
from pared.bench.savings import savings
from pared.bench.targets import read
from pared.errors import InputError
from tests.caching.pipelines import Way

TOYS = [name for name in presets.names("denoiser") if name.startswith("toy:")]
GIGA = 10**9


@cache
def pixart(side: int, converted: bool = False):
    """The bill of one pass of PixArt-Sigma, with EDiT or as published."""
    model = presets.build("pixart-sigma")
    return bill(pared.convert(model, EDiT()) if converted else model, side, side)


def pipeline(name: str):
    """A live toy pipeline with random weights on the CPU; its tokenizers aren't needed."""
    part = {key: presets.build(name, "cpu", component=key) for key in presets.get(name).components}
    if name == "toy:pixart":
        return diffusers.PixArtSigmaPipeline(
            tokenizer=None,
            text_encoder=part["text_encoder"],
            vae=part["vae"],
            transformer=part["denoiser"],
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    return diffusers.StableDiffusion3Pipeline(
        transformer=part["denoiser"],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=part["vae"],
        text_encoder=part["text_encoder"],
        tokenizer=None,
        text_encoder_2=part["text_encoder_2"],
        tokenizer_2=None,
        text_encoder_3=part["text_encoder_3"],
        tokenizer_3=None,
    )


# Published figures ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "teacher", "student"), [(512, 644.3, 675), (1024, 3316.8, 2627), (2048, 26183, 10436)]
)
def test_pixart_and_edit_cost_what_the_card_says(side, teacher, student):
    assert pixart(side).per_pass / GIGA == pytest.approx(teacher, rel=0.01)
    assert pixart(side, converted=True).per_pass / GIGA == pytest.approx(student, rel=0.01)


def test_edit_saves_seven_and_a_half_times_at_4096():
    ratio = pixart(4096).per_pass / pixart(4096, converted=True).per_pass
    assert ratio == pytest.approx(7.5, rel=0.01)


def test_edit_adds_the_parameters_of_the_card():
    added = pixart(1024, converted=True).parameters - pixart(1024).parameters
    assert added == 28 * 3_342_816
    assert pixart(1024).parameters == 610_856_096


def test_dit_xl_2_costs_118_7_gmacs():
    found = bill("dit-xl-2")
    assert found.headline == "dit-xl-2, 256x256, 50 steps x 2 passes, float32"
    assert found.per_pass / GIGA == pytest.approx(118.7, rel=0.01)
    assert found.text_tokens == 0


def test_sd35_medium_costs_5625_gmacs_with_its_full_prompt():
    found = bill("sd3.5-medium", 1024, 1024)
    assert found.text_tokens == 333
    assert found.per_pass / GIGA == pytest.approx(5625, rel=0.01)
    assert [line.passes for line in found.lines if line.part != "denoiser"] == [2, 2, 2, 1]
    assert max(map(len, str(found).splitlines())) <= 100


# Shape of the costs ---------------------------------------------------------------------------


def test_softmax_grows_sixteenfold_and_edit_fourfold_when_the_side_doubles():
    for small, large in ((512, 1024), (1024, 2048), (2048, 4096)):
        core = [pixart(side).kind(costs.CORE).macs for side in (small, large)]
        assert core[1] == 16 * core[0]
        core = [pixart(side, converted=True).kind(costs.CORE).macs for side in (small, large)]
        assert core[1] / core[0] == pytest.approx(4, rel=0.02)


def test_parts_of_pixart_are_those_of_its_formula():
    tokens, text, width, blocks = 64 * 64, 300, 1152, 28
    expected = {
        costs.CORE: blocks * 2 * tokens**2 * width,
        costs.PROJECTIONS: blocks * 4 * tokens * width**2,
        costs.CROSS: blocks * 2 * (tokens + text) * width**2 + blocks * 2 * tokens * text * width,
        costs.FEED_FORWARD: blocks * 8 * tokens * width**2,
        costs.CONVOLUTIONS: tokens * 4 * 2 * 2 * width,
    }
    assert {kind: pixart(1024).kind(kind).macs for kind in expected} == expected


@pytest.mark.parametrize("name", TOYS)
def test_lines_add_up_to_what_torch_counts(name):
    found = bill(name)
    assert sum(line.total for line in found.lines) == found.total
    assert sum(line["share"] for line in found.to_dict()["lines"]) == pytest.approx(1)
    model = presets.build(name)
    family = anatomy.of(model)
    text = presets.get(name).text_tokens or None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        family.denoise(model, *family.example(height=16, width=16, text_tokens=text, **clip(name)))
    assert 2 * found.per_pass == counter.get_total_flops()
    preset = presets.get(name)
    assert found.parameters == sum(part.parameters for part in preset.components.values())


def clip(name: str) -> dict[str, int]:
    """Of a toy of video, the frames that its latents have by default."""
    return {"frames": (presets.get(name).frames - 1) // 4 + 1} if name == "toy:wan" else {}


@pytest.mark.parametrize("name", TOYS)
def test_the_meta_device_counts_like_the_real_one(name):
    meta, real = (count_one_pass(presets.build(name, device)) for device in ("meta", "cpu"))
    assert meta.keys() == real.keys()
    for kind in meta:
        assert meta[kind].macs == real[kind].macs
        assert meta[kind].weight_bytes == real[kind].weight_bytes


def count_one_pass(model):
    family = anatomy.of(model)
    example = family.example(height=16, width=16)
    # The CPU's fused attention is the one kernel that torch's counter doesn't know.
    with sdpa_kernel(SDPBackend.MATH):
        found = costs.count(model, costs.BySite(family), lambda: family.denoise(model, *example))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return found


def test_the_feed_forward_of_one_stream_blocks_is_feed_forward():
    model = presets.build("toy:flux")
    sorting = costs.BySite(anatomy.of(model))
    assert sorting.of_module("single_transformer_blocks.0.proj_mlp") == costs.FEED_FORWARD
    assert sorting.of_module("single_transformer_blocks.0.attn.to_q") == costs.PROJECTIONS
    assert sorting.of_module("x_embedder") == costs.OTHER


def test_activations_are_counted_once_and_embeddings_compute_nothing():
    model = nn.Sequential(
        nn.Embedding(10, 4), nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Identity()
    )
    ids = torch.zeros(3, dtype=torch.long)
    cost = costs.count(model, costs.Whole(), lambda: model(ids))[costs.OTHER]
    assert cost.macs == 3 * 4 * 6
    assert cost.parameters == 10 * 4 + 4 * 6 + 6
    assert cost.weight_bytes == 4 * cost.parameters
    # The ids in 8 bytes each, then 4 and 6 numbers of 4 bytes for each of them.
    assert cost.activation_bytes == 3 * 8 + 3 * 4 * 4 + 3 * 6 * 4
    assert cost.largest_bytes == 3 * 6 * 4


def test_half_precision_halves_the_bytes_and_no_arithmetic():
    full, half = bill("toy:sd3"), bill("toy:sd3", dtype=torch.bfloat16)
    assert half.dtype == "bfloat16"
    assert half.total == full.total
    assert (
        half.kind(costs.PROJECTIONS).weight_bytes * 2 == full.kind(costs.PROJECTIONS).weight_bytes
    )
    for kind in (costs.PROJECTIONS, costs.FEED_FORWARD):
        assert half.kind(kind).activation_bytes * 2 == full.kind(kind).activation_bytes


def test_a_live_models_weights_are_billed_in_the_types_that_they_have(tmp_path):
    """Diffusers keeps Wan's tables and norms in float32, the first parameter among them."""
    presets.build("toy:wan", "cpu").save_pretrained(tmp_path)
    whole = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
    half = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    size = {"height": 64, "width": 64, "frames": 1}
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    twin = read(half).denoiser(None)
    assert {name: p.dtype for name, p in twin.named_parameters()} == kinds
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in read(half).denoiser(torch.float16).parameters()} == {torch.float16}
    bills = {kind: bill(model, **size) for kind, model in ((32, whole), (16, half))}
    assert (bills[32].dtype, bills[16].dtype) == ("float32", "bfloat16")
    assert bills[16].per_image == bills[32].per_image
    held = sum(t.nbytes for t in (*half.parameters(), *half.buffers()))
    assert sum(line.weight_bytes for line in bills[16].lines) == held


def test_a_batch_costs_as_much_per_image():
    one, four = bill("toy:unet"), bill("toy:unet", batch=4)
    assert four.per_image == one.per_image == four.total / 4
    assert four.parameters == one.parameters
    assert "batch 4" in four.headline


def test_steps_and_passes_multiply():
    found = bill("toy:dit", steps=7, passes=3)
    rest = next(line for line in found.lines if line.part == "vae")
    assert found.total == 21 * found.per_pass + rest.macs


def test_a_video_costs_what_its_frames_cost():
    short, long = bill("toy:wan"), bill("toy:wan", frames=9)
    text = "16 text tokens, float32"
    assert short.headline == f"toy:wan, 128x128 x 5 frames, 4 steps x 2 passes, {text}"
    assert "per video" in str(short) and "image" not in str(short)
    # 5 frames are 2 in the latents, 9 are 3.
    assert 4 * long.kind(costs.CORE).macs == 9 * short.kind(costs.CORE).macs
    assert 2 * long.kind(costs.FEED_FORWARD).macs == 3 * short.kind(costs.FEED_FORWARD).macs
    decoding = [next(line.macs for line in b.lines if line.part == "vae") for b in (short, long)]
    # Of the first latent frame one frame is made, of the others four.
    assert 1.5 < decoding[1] / decoding[0] < 9 / 5 + 0.1


def test_a_video_denoiser_alone_makes_the_clip_of_its_pipeline():
    found = bill(presets.build("wan2.1-t2v-1.3b"))
    assert (found.height, found.width, found.frames) == (480, 832, 81)
    assert "a latent frame behind the first is taken for 4 frames" in found.notes
    tokens, width = 21 * 30 * 52, 1536
    assert found.kind(costs.CORE).macs == 30 * 2 * tokens**2 * width


# What can be billed ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy:pixart", "toy:sd3"])
def test_a_live_pipeline_costs_what_its_preset_does_and_stays_as_it_is(name):
    live = pipeline(name)
    parts = {n: part for n, part in live.components.items() if isinstance(part, nn.Module)}
    before = {n: {k: v.clone() for k, v in part.state_dict().items()} for n, part in parts.items()}
    configs = {n: str(part.config) for n, part in parts.items()}
    tokens = presets.get(name).text_tokens
    found = bill(live, text_tokens=tokens)
    again = bill(name, steps=found.steps, passes=found.passes)
    assert sorted(map(str, found.lines)) == sorted(map(str, again.lines))
    assert (found.height, found.width, found.passes) == (128, 128, 2)
    for n, part in parts.items():
        assert str(part.config) == configs[n]
        assert all(torch.equal(v, before[n][k]) for k, v in part.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in part.modules())


def test_a_product_of_many_tasks_keeps_a_denoiser_for_each():
    one, four = bill("toy:unet"), bill("toy:unet", tasks=4)
    denoiser = presets.get("toy:unet").denoiser.parameters
    assert (one.models, four.models) == (1, 4)
    assert four.kept_parameters == four.parameters + 3 * denoiser
    assert four.per_image == one.per_image
    assert "Kept: 4 denoisers" in str(four)
    assert "Kept" not in str(one)


def test_methods_settle_passes_and_tasks():
    order = Order(read("toy:unet"), None, None, None, 3, 1, None, None, tasks=4)
    naive = order.bill(order.target.denoiser(None))
    denoiser = order.target.denoiser(None)
    pared.convert(denoiser, pared.MultiTaskUpcycling(), pared.ExplicitConditioning())
    ours = order.bill(denoiser)
    assert (naive.models, naive.passes, ours.models, ours.passes) == (4, 3, 1, 1)
    encoders = [line.passes for line in naive.lines if line.kind == "encode"]
    assert encoders == [2]
    assert [line.passes for line in ours.lines if line.kind == "encode"] == [1]
    assert ours.per_image < naive.per_image / 2
    assert ours.kept_parameters < naive.kept_parameters / 2


def test_a_live_pipeline_runs_as_its_class_does_by_default():
    found = bill(pipeline("toy:pixart"))
    assert (found.steps, found.passes, found.text_tokens) == (20, 2, 300)


SD = "StableDiffusion"
EDITING = {"in_channels": 8}
RUNS = [
    (1, "unet", "LatentConsistencyModelPipeline", {"time_cond_proj_dim": 256}),
    (1, "unet", f"{SD}Pipeline", {"time_cond_proj_dim": 256}),
    (2, "unet", f"{SD}Pipeline", {}),
    (3, "unet", f"{SD}PAGPipeline", {}),
    (2, "unet", f"{SD}PAGPipeline", {"time_cond_proj_dim": 256}),
    (3, "unet", f"{SD}InstructPix2PixPipeline", EDITING),
    (3, "unet", f"{SD}XLInstructPix2PixPipeline", EDITING),
    (3, "pixart", "PixArtSigmaPAGPipeline", {}),
    (3, "sd3", f"{SD}3PAGPipeline", {"dual_attention_layers": (), "qk_norm": None}),
    (1, "flux", "FluxPipeline", {"guidance_embeds": True}),
    (1, "flux", "FluxControlPipeline", {"in_channels": 128, "out_channels": 64}),
    (1, "flux", "FluxControlNetImg2ImgPipeline", {}),
]


@pytest.mark.parametrize(("passes", "family", "cls", "config"), RUNS)
def test_passes_are_those_of_a_run_by_default(passes, family, cls, config):
    flow = family in ("sd3", "flux")
    scheduler = Way.scheduler if flow else partial(diffusers.LCMScheduler, steps_offset=1)
    pictured = "Control" in cls or "Pix2Pix" in cls
    call = {"use_resolution_binning": False} if family == "pixart" else {}
    way = Way(cls, family, cls, 1, scheduler, call, config, pictured)
    pipe = way.build()
    model = pared.method.denoiser(pipe)
    counted = count(lambda: way.paint(pipe, 2), model)
    assert counted.passes == passes * counted.calls
    assert read(pipe).passes == passes


def test_a_folder_costs_what_it_was_saved_from_with_conversions_and_without_weights(tmp_path):
    live = pared.convert(pipeline("toy:pixart"), EDiT(r=2))
    pared.save(live, tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    found = bill(tmp_path / "model", text_tokens=16)
    assert sorted(map(str, found.lines)) == sorted(map(str, bill(live, text_tokens=16).lines))
    assert found.per_pass != bill("toy:pixart").per_pass
    assert found.headline.startswith(str(tmp_path / "model"))
    inner = bill(tmp_path / "model" / "vae" / ".." / "transformer")
    assert inner.steps == inner.passes == 1
    assert "a denoiser alone" in str(inner)


def test_what_is_left_out_is_said(tmp_path):
    pared.save(pipeline("toy:pixart"), tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "model" / "safety_checker").mkdir()
    (tmp_path / "model" / "safety_checker" / "config.json").write_text("{}")
    assert "Note: safety_checker not included" in str(bill(tmp_path / "model"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("pixart-sgma", "did you mean pixart-sigma"),
        ("/nowhere", "no folder and no preset '/nowhere'"),
        (nn.Linear(2, 2), "can't read a Linear"),
    ],
)
def test_other_things_are_refused(target, message):
    with pytest.raises(InputError, match=message):
        bill(target)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"neither a model_index\.json nor a config\.json"):
        bill(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "Mystery"}')
    with pytest.raises(InputError, match=r"holds a diffusers\.Mystery"):
        bill(tmp_path)


# Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy:pixart", "toy:sd3", "toy:flux", "toy:unet", "toy:sdxl"])
def test_odd_and_oblong_sizes_count(name):
    wide, high = bill(name, 144, 368), bill(name, 368, 144)
    assert wide.total == high.total
    if name not in ("toy:unet", "toy:sdxl"):
        tokens = (144 // 16) * (368 // 16)
        usual = bill(name).kind(costs.CONVOLUTIONS).macs
        assert wide.kind(costs.CONVOLUTIONS).macs * 64 == usual * tokens


def test_converted_models_count_at_odd_sizes():
    model = pared.convert(presets.build("toy:pixart"), EDiT(r=2))
    assert bill(model, 144, 368).kind(costs.CORE).macs > 0


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("toy:pixart", {"height": 1000}, "height=1000 is not a multiple of 16.* 992 or 1008"),
        ("toy:flux", {"width": 8}, "width=8 is not a multiple of 16; the nearest .* 16"),
        ("toy:unet", {"width": 100}, "width=100 is not a multiple of 8.* 96 or 104"),
        ("toy:unet", {"height": 0}, "height=0 doesn't work"),
        ("toy:dit", {"height": 256}, "can't run at 256x128 pixels: .* a height equal to the width"),
        ("toy:sd3", {"height": 512, "width": 512}, "can't run at 512x512 pixels: Height"),
        ("toy:dit", {"text_tokens": 8}, "takes no text"),
        ("toy:dit", {"steps": 0}, "steps=0 doesn't work"),
        ("toy:dit", {"batch": 1.5}, "batch=1.5 doesn't work"),
        ("toy:dit", {"frames": 5}, "toy:dit makes pictures; leave frames out"),
        ("toy:wan", {"frames": 7}, "frames=7 is none; the nearest that works is 5 or 9"),
        ("toy:wan", {"frames": 0}, "frames=0 doesn't work"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name, size, message):
    with pytest.raises(InputError, match=message):
        bill(name, **size)


# Tables ---------------------------------------------------------------------------------------


def test_a_bill_survives_json_and_csv():
    found = bill("toy:sdxl")
    content = json.loads(found.table("json"))
    assert content == json.loads(json.dumps(found.to_dict()))
    assert content["total_macs"] == found.total
    assert content["flops_per_image"] == 2 * found.per_image
    rows = list(csv.DictReader(io.StringIO(found.table("csv"))))
    assert [int(row["macs"]) for row in rows] == [line.macs for line in found.lines]


@pytest.mark.parametrize("name", TOYS)
def test_tables_fit_a_terminal_and_say_everything(name):
    text = bill(name).table()
    assert max(map(len, text.splitlines())) <= 100
    size = "128x128 x 5 frames" if name == "toy:wan" else "128x128"
    assert text.splitlines()[0].startswith(f"{name}, {size}, 4 steps x ")
    for word in ("denoiser", "vae, decode", "total", "MACs", "FLOPs", "100.0%"):
        assert word in text


def test_markdown_has_a_row_per_line():
    found = bill("toy:dit")
    rows = [line for line in found.table("md").splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    # Two of heads, one of the denoiser, one of the total.
    assert len(rows) == 4 + len(found.lines)


def test_an_unknown_format_is_refused():
    with pytest.raises(InputError, match="there is no format 'html'"):
        bill("toy:dit").table("html")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "-"),
        (544, "544"),
        (54_400, "54.40 k"),
        (610_856_096, "610.9 M"),
        (999_960_000, "1.000 G"),
    ],
)
def test_numbers_have_four_digits(number, text):
    assert bill_tables.short(number) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "-"),
        (100, "100 B"),
        (2252, "2.20 KiB"),
        (99.97 * 2**20, "100 MiB"),
        (9.797 * 2**30, "9.80 GiB"),
        (2**42, "4.00 TiB"),
    ],
)
def test_bytes_have_three_digits(size, text):
    assert bill_tables.memory(size) == text


# Savings --------------------------------------------------------------------------------------


def test_savings_are_what_converting_would_give():
    found = savings("toy:pixart")
    edit = next(saving for saving in found if saving.slug == "edit")
    model = pared.convert(presets.build("toy:pixart"), EDiT())
    after = bill(model, text_tokens=16)
    before = bill(presets.build("toy:pixart"))
    assert edit.after == after.per_pass
    assert edit.parameters == after.parameters - before.parameters
    assert edit.ratio == edit.before / after.per_pass
    assert edit.ratio == pytest.approx(edit.image_ratio, rel=0.2)
    core = next(move for move in edit.moves if move.kind == costs.CORE)
    assert core.after == after.kind(costs.CORE).macs < core.before
    assert [s.ratio for s in found] == sorted((s.ratio for s in found), reverse=True)


def test_savings_that_do_not_fit_say_why():
    found = savings("toy:flux")
    assert "edit" not in [saving.slug for saving in found]
    assert "can't be used on FluxTransformer2DModel" in found.refused["edit"]
    assert found.refused["edit"] in " ".join(str(found).split())


def test_savings_of_a_converted_model_leave_out_what_it_has():
    model = pared.convert(presets.build("toy:pixart"), EDiT())
    assert "already carries edit" in savings(model).refused["edit"]


def test_savings_read_well_and_survive_json():
    found = savings("toy:unet", 256, 256)
    assert max(map(len, str(found).splitlines())) <= 100
    content = json.loads(found.table("json"))
    assert content["savings"][0]["slug"] == found[0].slug
    assert content["savings"][0]["ratio"] == found[0].ratio
