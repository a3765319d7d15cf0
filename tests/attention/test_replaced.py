"""Processors that others replace, before a conversion or behind it; and weights stored narrow."""

import copy

import pytest
import torch
from torch import nn

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention.clear import Clear
from pared.attention.edit import EDiT
from pared.attention.linfusion import LinFusion
from pared.attention.mm_edit import MMEDiT
from pared.attention.sana import Sana
from pared.errors import InputError


def toy(family, *methods):
    torch.manual_seed(0)
    return pared.convert(presets.build(f"toy:{family}", device="cpu"), *methods)


def output(model):
    family = anatomy.of(model)
    seed = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return family.denoise(model, *family.example(1, 8, 8, text_tokens=8, generator=seed))


def sliced_and_back(model):
    model.set_attention_slice("auto")
    model.set_attention_slice(None)


# What diffusers does at a call of the pipeline's that sounds harmless; xformers wants a GPU.
REPLACEMENTS = [
    ("unet", LinFusion(), lambda model: model.set_attention_slice("auto"), "SlicedAttnProcessor"),
    ("unet", LinFusion(), sliced_and_back, "AttnProcessor2_0"),
    ("unet", LinFusion(), lambda model: model.fuse_qkv_projections(), "FusedAttnProcessor2_0"),
    ("pixart", EDiT(), lambda model: model.fuse_qkv_projections(), "FusedAttnProcessor2_0"),
    ("sd3", MMEDiT(), lambda model: model.fuse_qkv_projections(), "FusedJointAttnProcessor2_0"),
]


@pytest.mark.parametrize("family, method, replace, by", REPLACEMENTS)
def test_replaced_behind_a_conversion(family, method, replace, by, tmp_path):
    model = toy(family, method)
    twin, wanted = copy.deepcopy(model), output(model)
    replace(model)
    message = rf"{method.info.slug} does nothing in \S+ any more, where a {by} replaced"
    with pytest.raises(InputError, match=message):
        output(model)
    with pytest.raises(InputError, match=message):
        pared.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    assert torch.equal(output(twin), wanted), "the copy looks at the original"
    replace(twin)
    with pytest.raises(InputError, match=message):
        output(twin)


def test_replaced_behind_loading_and_compiling(tmp_path):
    model = pared.load(pared.save(toy("unet", LinFusion()), tmp_path / "m"))
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend="eager")
        output(compiled)
        model.set_attention_slice("auto")
        with pytest.raises(InputError, match="linfusion does nothing in"):
            output(compiled)
    finally:
        torch._dynamo.reset()


def test_other_layers_may_be_replaced():
    model = toy("pixart", EDiT(layers=(0,)))
    wanted, theirs = output(model), model.transformer_blocks[1].attn1
    theirs.set_processor(type(theirs.processor)())
    assert torch.equal(output(model), wanted)


# IP-Adapters --------------------------------------------------------------------------------------


def load_ip_adapter(model):
    """Put the weights of an IP-Adapter of 4 tokens into a toy, as its pipeline does."""
    unet = anatomy.of(model).name == "unet"
    width = model.config.cross_attention_dim if unet else model.config.joint_attention_dim
    reads = [name for name in model.attn_processors if "attn2" in name or not unet]
    weights = {}
    for number, name in enumerate(name for name in reads if "single" not in name):
        out = model.get_submodule(name.removesuffix(".processor")).to_q.out_features
        key = 2 * number + 1 if unet else number
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{key}.{part}.weight"] = torch.randn(out, width)
            weights[f"{key}.{part}.bias"] = torch.randn(out)
    shapes = {"proj.weight": (4 * width, 8), "proj.bias": (4 * width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    image = {name: torch.randn(shape) for name, shape in shapes.items()}
    model._load_ip_adapter_weights(
        [{"image_proj": image, "ip_adapter": weights}], low_cpu_mem_usage=False
    )
    return model


def test_a_conversion_doesnt_overwrite_an_ip_adapter():
    model = load_ip_adapter(toy("flux"))
    theirs = model.attn_processors
    with pytest.raises(
        InputError, match=r"clear can't be attached to \S+, whose FluxIPAdapterAttnProcessor isn't"
    ):
        pared.convert(model, Clear())
    assert all(now is theirs[name] for name, now in model.attn_processors.items())
    assert pared.method.stack_of(model) == []


@pytest.mark.parametrize("family, method", [("unet", LinFusion()), ("flux", Clear())])
def test_an_ip_adapter_on_a_converted_model_is_refused_and_changes_nothing(family, method):
    model = toy(family, method)
    wanted = output(model)
    with pytest.raises(InputError, match=r"can't be made anew, .* IP-Adapter"):
        load_ip_adapter(model)
    assert torch.equal(output(model), wanted)


def test_a_converted_unet_with_an_ip_adapter_is_not_saved(tmp_path):
    model = pared.convert(load_ip_adapter(toy("unet")), LinFusion())
    with pytest.raises(
        InputError, match=r"UNet2DConditionModel has a weight that loading wouldn't know, '\S+'"
    ):
        pared.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


# Weights that are stored in another type than the model computes in -----------------------------


@pytest.mark.parametrize("method", [EDiT(), Sana(mix_ffn=True), Clear(pool=2)], ids=str)
def test_weights_stored_in_eight_bits(method):
    model = presets.build("toy:pixart", device="cpu", dtype=torch.bfloat16)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    pared.convert(model, method)
    found = output(model)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


def test_weights_stored_as_integers():
    """As bitsandbytes and GGUF store those of linear layers."""
    model = toy("flux")
    for site in anatomy.of(model).sites("joint_attention"):
        weight = torch.zeros(site.module.to_q.weight.shape, dtype=torch.uint8)
        site.module.to_q.weight = nn.Parameter(weight, requires_grad=False)
    pared.convert(model, Clear(pool=2))
    types = {p.dtype for n, p in model.named_parameters() if ".processor." in n}
    assert types == {torch.float32}
