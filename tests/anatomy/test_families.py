"""Every family, on toy models of the real classes: sites, calls, grids, wrappers."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from tests.recipes.pipelines import pipeline
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from torch import nn
from transformers import BatchEncoding, PreTrainedTokenizerFast

from pared import anatomy
from pared.anatomy import flux, presets, unet, wan
from pared.errors import InputError


@dataclass(frozen=True)
class Expected:
    """What the anatomy must find in a toy.

    Attributes:
        family: its name.
        blocks: number of blocks.
        sites: number of sites of each kind.
        conditions: entries of its condition.
        sizes: two sizes of latents, in pixels, both with an odd grid.
        levels: pixels per token at its different resolutions.
    """

    family: str
    blocks: int
    sites: dict[str, int]
    conditions: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] = ((10, 14), (18, 6))
    levels: tuple[int, ...] = (2,)


def per_block(blocks: int) -> dict[str, int]:
    return dict.fromkeys(("self_attention", "cross_attention", "feed_forward"), blocks)


EXPECTED = {
    "toy:pixart": Expected("pixart", 2, per_block(2), ("text", "mask")),
    "toy:dit": Expected(
        "dit",
        2,
        {"self_attention": 2, "feed_forward": 2, "modulation": 2},
        ("label",),
        sizes=((10, 10), (6, 6)),
    ),
    "toy:sd3": Expected(
        "sd3",
        3,
        {"joint_attention": 3, "self_attention": 1, "feed_forward": 5, "modulation": 6},
        ("text", "pooled"),
    ),
    "toy:flux": Expected(
        "flux",
        4,
        {"joint_attention": 4, "feed_forward": 4, "modulation": 6},
        ("text", "pooled", "guidance"),
    ),
    "toy:unet": Expected("unet", 4, per_block(4), ("text",), ((9, 7), (5, 12)), levels=(1, 2)),
    "toy:sdxl": Expected(
        "unet", 8, per_block(8), ("text", "pooled", "time_ids"), ((9, 7), (5, 12)), levels=(2,)
    ),
    "toy:wan": Expected("wan", 2, per_block(2), ("text",)),
    "toy:lumina": Expected("lumina", 2, per_block(2) | {"modulation": 2}, ("text", "mask")),
}
NAMES = tuple(EXPECTED)
JOINT = ("toy:sd3", "toy:flux")
TEXT_TOKENS = 11


def toy(name: str) -> nn.Module:
    return presets.build(name, device="cpu")


def example(model: nn.Module, size: tuple[int, int], batch: int = 1):
    seed = torch.Generator().manual_seed(0)
    return anatomy.of(model).example(batch, *size, text_tokens=TEXT_TOKENS, generator=seed)


@torch.no_grad()
def call(model: nn.Module, size: tuple[int, int], batch: int = 1) -> torch.Tensor:
    return anatomy.of(model).denoise(model, *example(model, size, batch))


class Wrapper(nn.Module):
    """What DDP looks like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


# Finding ------------------------------------------------------------------------------------------


def test_every_toy_and_family_is_in_the_table():
    assert set(NAMES) == {n for n in presets.names("denoiser") if n.startswith("toy:")}
    known = {f.name for f in anatomy.families().values() if f.kind == "denoiser"}
    assert known == {expected.family for expected in EXPECTED.values()}


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_those_expected(name):
    model, expected = toy(name), EXPECTED[name]
    family = anatomy.of(model)
    assert family.name == expected.family
    assert family.conditions == expected.conditions
    assert [block.index for block in family.blocks] == list(range(expected.blocks))
    kinds = [site.kind for site in family.sites()]
    assert {kind: kinds.count(kind) for kind in kinds} == expected.sites


@pytest.mark.parametrize("name", NAMES)
def test_paths_lead_to_the_modules(name):
    model = toy(name)
    family = anatomy.of(model)
    for block in family.blocks:
        assert model.get_submodule(block.path) is block.module
        for site in block.sites:
            assert model.get_submodule(site.path) is site.module
            assert site.block == block.index
    paths = [site.path for site in family.sites()]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_in_the_order_of_execution(name):
    model = toy(name)
    ran = []
    for block in anatomy.of(model).blocks:
        block.module.register_forward_hook(lambda *_, index=block.index: ran.append(index))
    call(model, EXPECTED[name].sizes[0])
    assert ran == list(range(EXPECTED[name].blocks))


@pytest.mark.parametrize("name", NAMES)
def test_width_and_heads_of_attentions(name):
    for site in anatomy.of(toy(name)).sites("self_attention", "joint_attention"):
        assert site.width % 32 == 0
        assert site.width // site.heads >= 16


def test_unet_names_an_attention_that_reads_only_text():
    config = presets.get("toy:unet").denoiser.config | {"only_cross_attention": (True, False)}
    model = type(toy("toy:unet"))(**config)
    kinds = {site.path: site.kind for site in anatomy.of(model).sites()}
    assert kinds["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == "cross_attention"
    assert kinds["mid_block.attentions.0.transformer_blocks.0.attn1"] == "self_attention"


def test_unet_without_a_middle():
    config = presets.get("toy:unet").denoiser.config | {"mid_block_type": None}
    family = anatomy.of(type(toy("toy:unet"))(**config))
    assert len(family.blocks) == EXPECTED["toy:unet"].blocks - 1


def test_replace_puts_a_module_in_place():
    family = anatomy.of(toy("toy:pixart"))
    site = family.sites("feed_forward")[0]
    other = nn.Identity()
    family.replace(site.path, other)
    assert family.model.get_submodule(site.path) is other


@pytest.mark.parametrize("name", NAMES)
def test_without_its_branches_a_block_hands_on_what_it_gets(name):
    """So `branches` lists every addition, and blocks read and build their streams rightly."""
    model = toy(name)
    family, seen = anatomy.of(model), []
    for branch in family.branches:
        assert model.get_submodule(branch.path) is branch.module
        assert branch.path.startswith(family.blocks[branch.block].path)
        branch.module.register_forward_hook(lambda module, args, output: nothing(output))
    for block in family.blocks:

        def compare(module, args, kwargs, result, block=block):
            tokens, outputs = block.tokens(args, kwargs), block.outputs(result)
            assert len(tokens) == len(outputs) == len(block.returns)
            for before, after in zip(tokens, outputs, strict=True):
                assert after is None or torch.equal(before, after), block.path
            again = block.result(outputs)
            assert type(again) is type(result)
            seen.append(block.index)

        block.module.register_forward_hook(compare, with_kwargs=True)
    call(model, EXPECTED[name].sizes[0])
    assert seen == list(range(len(family.blocks)))


def nothing(output):
    if isinstance(output, tuple):
        return tuple(None if part is None else torch.zeros_like(part) for part in output)
    return torch.zeros_like(output)


# Wrappers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_models_are_found_inside_wrappers(name):
    model = toy(name)
    for wrapped in (torch.compile(model), Wrapper(model), Wrapper(torch.compile(model))):
        assert anatomy.of(wrapped).model is model


@pytest.mark.parametrize("name", NAMES)
def test_models_with_adapters(name):
    peft = pytest.importorskip("peft")
    model, size = toy(name), EXPECTED[name].sizes[0]
    before, widths = call(model, size), [s.width for s in anatomy.of(model).sites() if _attends(s)]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["to_q", "to_v"]))
    family = anatomy.of(wrapped)
    assert family.model is model
    assert [site.width for site in family.sites() if _attends(site)] == widths
    # A new adapter adds nothing yet.
    torch.testing.assert_close(call(wrapped, size), before)


def _attends(site: anatomy.Site) -> bool:
    return site.kind.endswith("attention")


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(InputError, match=r"can't read a Linear; it reads .*SD3Transformer2DModel"):
        anatomy.of(nn.Linear(2, 2))


# Calling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_denoise_gives_finite_latents(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = presets.build(name, device="cpu", dtype=dtype)
        for height, width in EXPECTED[name].sizes:
            output = call(model, (height, width), batch=2)
            channels = presets.get(name).latent_channels
            frames = (wan.FRAMES,) if name == "toy:wan" else ()
            assert output.shape == (2, channels, *frames, height, width)
            assert output.dtype == dtype
            assert output.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_denoise_through_a_wrapper_and_in_a_batch(name):
    model, size = toy(name), EXPECTED[name].sizes[0]
    latents, timestep, condition = example(model, size, batch=2)
    family = anatomy.of(model)
    with torch.no_grad():
        both = family.denoise(Wrapper(model), latents, timestep, condition)
        second = {key: value[1:] for key, value in condition.items()}
        alone = family.denoise(model, latents[1:], timestep[1:], second)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_denoise_listens_to_every_condition_and_to_time(name):
    model = toy(name)
    latents, timestep, condition = example(model, EXPECTED[name].sizes[0])
    family = anatomy.of(model)
    other = {"label": lambda x: (x + 1) % 10, "mask": lambda x: x * (torch.arange(11) < 5)}
    with torch.no_grad():
        base = family.denoise(model, latents, timestep, condition)
        assert not torch.equal(family.denoise(model, latents, timestep - 400, condition), base)
        for key, value in condition.items():
            changed = condition | {key: other.get(key, lambda x: x * 3)(value)}
            assert not torch.equal(family.denoise(model, latents, timestep, changed), base), key


@pytest.mark.parametrize("name", NAMES)
def test_denoise_on_the_meta_device(name):
    grids = []
    for device in ("meta", "cpu"):
        model = presets.build(name, device=device)
        family = anatomy.of(model)
        grids.append(family.grid(family.sites()[-1]))
        latents, timestep, condition = family.example(1, *EXPECTED[name].sizes[0])
        with torch.no_grad():
            output = family.denoise(model, latents, timestep, condition)
        assert output.device.type == device
        assert output.shape == latents.shape
    assert (grids[0].height, grids[0].width) == (grids[1].height, grids[1].width)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_condition_is_named(name):
    model = toy(name)
    latents, timestep, condition = example(model, EXPECTED[name].sizes[0])
    first = next(iter(condition))
    rest = {key: value for key, value in condition.items() if key != first}
    with pytest.raises(InputError, match=f"no '{first}'"):
        anatomy.of(model).denoise(model, latents, timestep, rest)


@pytest.mark.parametrize("name", [n for n in NAMES if EXPECTED[n].family != "unet"])
def test_a_size_that_would_be_cropped_is_refused(name):
    model = toy(name)
    latents, timestep, condition = example(model, (8, 8))
    with pytest.raises(InputError, match=r"7 x 8 don't divide .* multiples of 2"):
        anatomy.of(model).denoise(model, latents[..., :7, :], timestep, condition)


def test_dit_refuses_what_diffusers_would_scramble():
    model = toy("toy:dit")
    latents, timestep, condition = example(model, (8, 18))
    # 4 x 9 patches come back as a picture of 6 x 6 patches, without a word.
    assert model(latents, timestep, condition["label"]).sample.shape[-2:] == (12, 12)
    with pytest.raises(InputError, match=r"8 x 18 .* use a height equal to the width"):
        anatomy.of(model).denoise(model, latents, timestep, condition)


def test_unet_conditioned_otherwise_is_refused():
    model = toy("toy:unet")
    model.register_to_config(addition_embed_type="image")
    with pytest.raises(InputError, match="conditioned by 'image'"):
        anatomy.of(model)


def test_sdxl_fills_in_the_size_of_the_picture():
    model = toy("toy:sdxl")
    latents, timestep, condition = example(model, (9, 7))
    assert unet.size_ids(latents).tolist() == [[72, 56, 0, 0, 72, 56]]
    family = anatomy.of(model)
    with torch.no_grad():
        given = family.denoise(model, latents, timestep, condition)
        del condition["time_ids"]
        torch.testing.assert_close(family.denoise(model, latents, timestep, condition), given)


def test_sdxl_encodes_the_empty_prompt_as_its_pipeline_does():
    pipe = pipeline("sdxl")
    with torch.no_grad():
        text, null_text, pooled, null_pooled = pipe.encode_prompt("a fox")
    found = anatomy.of(pipe.unet).encode(pipe, ["", "a fox"])
    torch.testing.assert_close(found["text"], torch.cat([null_text, text]))
    torch.testing.assert_close(found["pooled"], torch.cat([null_pooled, pooled]))
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    found = anatomy.of(pipe.unet).encode(pipe, ["", "a fox"])
    assert found["text"][0].any() and found["pooled"][0].any()


def test_pixart_tells_the_size_as_its_pipeline_does():
    config = presets.get("toy:pixart").denoiser.config | {
        "sample_size": 128, "num_attention_heads": 3, "cross_attention_dim": 48,
        "use_additional_conditions": None,
    }  # fmt: skip
    model, seen = type(toy("toy:pixart"))(**config).eval(), []
    parts = pipeline("pixart").components | {"transformer": model}
    pipe = PixArtAlphaPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    model.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    short = {"guidance_scale": 1, "num_inference_steps": 2, "use_resolution_binning": False}
    pipe("a fox", height=64, width=96, output_type="latent", **short)
    call(model, (8, 12))
    stock, _, ours = (given["added_cond_kwargs"] for given in seen)
    assert stock["resolution"].tolist() == [[64, 96]]
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


@pytest.mark.parametrize(
    ("cls", "longest"), [(PixArtAlphaPipeline, 120), (PixArtSigmaPipeline, 300)]
)
def test_pixart_encodes_prompts_as_its_pipeline_does(cls, longest):
    """Its T5 tells capitals apart: a prompt may have more tokens in lower case."""
    pieces = ["<pad>", "FOX", "f", "o", "x"]
    words = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    pipe = cls(**pipeline("pixart").components | {"tokenizer": tokenizer})
    family = anatomy.of(pipe.transformer)
    with torch.no_grad():
        text, mask, _, _ = pipe.encode_prompt("FOX", do_classifier_free_guidance=False)
    found = family.encode(pipe, ["FOX"])
    assert found["mask"].sum() == mask.sum() == 3
    torch.testing.assert_close(found["text"][0], text[0, :3])
    assert family.encode(pipe, ["o" * 400])["text"].shape[1] == longest


def test_flux_fills_in_the_pipelines_guidance():
    model = toy("toy:flux")
    latents, timestep, condition = example(model, (10, 14))
    family = anatomy.of(model)
    with torch.no_grad():
        given = family.denoise(model, latents, timestep, condition)
        del condition["guidance"]
        torch.testing.assert_close(family.denoise(model, latents, timestep, condition), given)


def test_flux_without_guidance_embedding():
    config = presets.get("toy:flux").denoiser.config | {"guidance_embeds": False}
    model = type(toy("toy:flux"))(**config)
    assert anatomy.of(model).conditions == ("text", "pooled")
    assert call(model, (10, 14)).isfinite().all()


def test_flux_packs_as_its_pipeline_does():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 10, 14)
    tokens = FluxPipeline._pack_latents(latents, 2, 16, 10, 14)
    assert torch.equal(flux.pack(latents), tokens)
    assert torch.equal(flux.unpack(tokens, 5, 7), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 5, 7, "cpu", torch.float32)
    assert torch.equal(flux.image_ids(5, 7), ids)


# The tokens of a call -----------------------------------------------------------------------------


def watch(model: nn.Module) -> list[tuple[anatomy.Site, int, int, int, int, int]]:
    """For every call of every site: the site, tokens in, text tokens beside, the grid's tokens,
    height and width."""
    family, seen = anatomy.of(model), []

    def hook(site, grid):
        def record(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            beside = kwargs.get("encoder_hidden_states")
            text = 0 if beside is None else beside.shape[1]
            seen.append((site, hidden.shape[1], text, grid.tokens, grid.height, grid.width))

        return record

    for site in family.sites():
        site.module.register_forward_pre_hook(hook(site, family.grid(site)), with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_grid_follows_the_size_of_every_call(name):
    model, expected = toy(name), EXPECTED[name]
    seen = watch(model)
    for pixels in (*expected.sizes, expected.sizes[0]):
        seen.clear()
        call(model, pixels)
        assert {site.path for site, *_ in seen} == {s.path for s in anatomy.of(model).sites()}
        # Levels of a U-Net round up, patches divide exactly.
        allowed = {tuple(-(-side // level) for side in pixels) for level in expected.levels}
        assert {(height, width) for *_, height, width in seen} == allowed
        for site, tokens, text, image, height, width in seen:
            assert image == height * width * (wan.FRAMES if name == "toy:wan" else 1)
            if site.stream == "image":
                assert tokens == image, site.path
            elif site.stream == "text":
                assert tokens == TEXT_TOKENS, site.path
            else:
                assert tokens + text == image + TEXT_TOKENS, site.path


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_is_installed_once_and_copied_with_the_model(name):
    model = toy(name)
    family = anatomy.of(model)
    site = family.sites()[0]
    grid = family.grid(site)
    assert family.grid(site) is grid
    assert anatomy.of(Wrapper(model)).grid(site) is grid

    small, large = EXPECTED[name].sizes
    call(model, small)
    mine = (grid.height, grid.width)
    twin = copy.deepcopy(model)
    theirs = anatomy.of(twin).grid(anatomy.of(twin).sites()[0])
    assert theirs is not grid
    call(twin, large)
    assert (grid.height, grid.width) == mine
    assert (theirs.height, theirs.width) != mine


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_changes_no_output(name):
    model, size = toy(name), EXPECTED[name].sizes[0]
    before = call(model, size)
    family = anatomy.of(model)
    for site in family.sites():
        family.grid(site)
    assert torch.equal(call(model, size), before)


@pytest.mark.parametrize("name", JOINT)
def test_streams_tell_image_from_text_in_the_softmax(name, monkeypatch):
    model = toy(name)
    family = anatomy.of(model)
    for site in family.sites("joint_attention"):
        # Text keys become zero; image keys don't. One-stream blocks share one projection.
        if getattr(site.module, "add_k_proj", None) is not None:
            nn.init.zeros_(site.module.add_k_proj.weight)
            nn.init.zeros_(site.module.add_k_proj.bias)
    grid = family.grid(family.sites("joint_attention")[0])
    keys, attend = [], F.scaled_dot_product_attention

    def record(query, key, value, *args, **kwargs):
        keys.append(key)
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    call(model, (10, 14))
    joint = [key for key in keys if key.shape[2] == 35 + TEXT_TOKENS][:2]
    assert len(joint) == 2
    for key in joint:
        image, text = grid.streams(key.shape[2])
        size = key.abs().sum(dim=(0, 1, 3))
        assert len(size[image]) == 35
        assert (size[image] > 0).all()
        assert len(size[text]) == TEXT_TOKENS
        assert (size[text] == 0).all()


def test_one_stream_blocks_of_flux_hold_the_text_first():
    model = toy("toy:flux")
    family = anatomy.of(model)
    last = family.sites("joint_attention")[-1]
    grid = family.grid(last)
    block = model.get_submodule(last.path.rpartition(".")[0])
    rows = {}

    def record(module, args, kwargs):
        rows["image"], rows["text"] = kwargs["hidden_states"], kwargs["encoder_hidden_states"]

    block.register_forward_pre_hook(record, with_kwargs=True)
    block.norm.register_forward_pre_hook(lambda module, args: rows.update(joint=args[0]))
    call(model, (10, 14))
    image, text = grid.streams(rows["joint"].shape[1])
    assert torch.equal(rows["joint"][:, image], rows["image"])
    assert torch.equal(rows["joint"][:, text], rows["text"])


def test_flux_reads_the_grid_of_pipeline_calls():
    grid = flux.PackedGrid()
    # Row 299 is no bfloat16 number; the pipeline makes its ids in the type of the prompt.
    for ids in (flux.image_ids(300, 5).bfloat16(), flux.image_ids(300, 5)[None]):
        grid(nn.Identity(), (), {"img_ids": ids})
        assert (grid.height, grid.width) == (300, 5)
    grid(nn.Identity(), (None, None, None, None, flux.image_ids(3, 4)), {})
    assert (grid.height, grid.width) == (3, 4)


def test_flux_refuses_a_grid_with_reference_images():
    reference = flux.image_ids(3, 4)
    reference[:, 0] = 1
    plain, grid = flux.image_ids(3, 4), flux.PackedGrid()
    for ids, readable in ((plain, True), (torch.cat([plain, reference]), False), (plain, True)):
        # Nobody may want to know: a method that was taken off leaves its grid behind.
        grid(nn.Identity(), (), {"img_ids": ids})
        if readable:
            assert grid.tokens == 12
            continue
        for ask in (grid.require, lambda: grid.width, lambda: grid.streams(30)):
            with pytest.raises(InputError, match=r"24 image tokens .* don't form one grid"):
                ask()


# Video --------------------------------------------------------------------------------------------


def test_wan_is_called_as_its_pipeline_calls_it():
    model = toy("toy:wan")
    family = anatomy.of(model)
    latents, timestep, condition = family.example(2, 8, 12, text_tokens=5, frames=3)
    assert latents.shape == (2, 16, 3, 8, 12)
    with torch.no_grad():
        ours = family.denoise(model, latents, timestep, condition)
        theirs = model(latents, timestep, encoder_hidden_states=condition["text"]).sample
    assert torch.equal(ours, theirs)


def test_the_grid_of_a_video_follows_its_frames():
    model = toy("toy:wan")
    family = anatomy.of(model)
    grid = family.grid(family.sites()[0])
    for frames, height, width in ((3, 8, 12), (1, 4, 4)):
        example = family.example(1, height, width, text_tokens=5, frames=frames)
        with torch.no_grad():
            family.denoise(model, *example)
        assert (grid.frames, grid.height, grid.width) == (frames, height // 2, width // 2)
        assert grid.tokens == frames * height * width // 4


def test_wan_that_starts_from_a_picture_reads_its_features_too():
    config = presets.get("toy:wan").denoiser.config
    config = config | {"in_channels": 36, "image_dim": 24, "added_kv_proj_dim": 32}
    model = type(toy("toy:wan"))(**config).eval()
    family = anatomy.of(model)
    assert (family.conditions, family.channels) == (("text", "image"), 36)
    latents, timestep, condition = family.example(1, 8, 8, frames=2)
    with torch.no_grad():
        output = family.denoise(model, latents, timestep, condition)
        changed = condition | {"image": condition["image"] * 3}
        other = family.denoise(model, latents, timestep, changed)
    assert output.shape == (1, 16, 2, 8, 8)
    assert not torch.equal(output, other)
    with pytest.raises(InputError, match="no 'image'"):
        family.denoise(model, latents, timestep, {"text": condition["text"]})


def test_frames_that_would_be_cropped_are_refused():
    config = presets.get("toy:wan").denoiser.config | {"patch_size": (2, 2, 2)}
    model = type(toy("toy:wan"))(**config)
    family = anatomy.of(model)
    with pytest.raises(InputError, match=r"3 latent frames don't divide .* a multiple of 2"):
        family.denoise(model, *family.example(1, 8, 8, text_tokens=5, frames=3))


def test_wan_encodes_prompts_as_its_pipeline_does():
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    part = {n: presets.build("toy:wan", "cpu", component=n) for n in ("vae", "text_encoder")}
    pipe = WanPipeline(
        tokenizer=Words(),
        transformer=toy("toy:wan"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **part,
    )
    prompts = ["a fox", "two red foxes"]
    found = anatomy.of(pipe.transformer).encode(pipe, prompts)
    with torch.no_grad():
        wanted, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=512
        )
    assert found["text"].shape == (2, 512, 64)
    assert torch.equal(found["text"], wanted)


class Words:
    """A tokenizer that gives every word a number."""

    def __call__(self, prompts, max_length, **kwargs):
        ids, mask = torch.zeros(2, len(prompts), max_length, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            words = [1 + len(word) for word in prompt.split()]
            ids[row, : len(words)], mask[row, : len(words)] = torch.tensor(words), 1
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})


def test_a_dit_in_training_drops_no_labels():
    """That is for the data; diffusers' blocks would each drop others."""
    model = presets.build("toy:dit", device="cpu")
    family = anatomy.of(model)
    example = family.example(batch=32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        evaluated = family.denoise(model.eval(), *example)
        trained = family.denoise(model.train(), *example)
    torch.testing.assert_close(trained, evaluated)
