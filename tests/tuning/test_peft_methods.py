"""LoRA and (IA)^3: their papers' formulas on the layers that the anatomy names."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention.edit import EDiT
from pared.errors import InputError
from pared.experts.multi_task_upcycling import MultiTaskUpcycling
from pared.method import stack_of
from pared.tuning.adapters import load_adapter, save_adapter
from pared.tuning.difffit import DiffFit
from pared.tuning.ia3 import IA3
from pared.tuning.lora import LoRA
from tests.tuning.test_difffit import output, stirred, toy, trained

peft = pytest.importorskip("peft")

EVERYWHERE = ("q", "k", "v", "out", "fc1", "fc2")
FAMILIES = ("dit", "pixart", "sd3", "unet", "flux")


def wrapped(model: nn.Module) -> set[str]:
    layers = peft.tuners.tuners_utils.BaseTunerLayer
    return {path for path, module in model.named_modules() if isinstance(module, layers)}


@pytest.mark.parametrize("method", [LoRA(places=EVERYWHERE), LoRA(), IA3()], ids=lambda m: m.spec())
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_at_first(method, family):
    model = toy(family, method)
    torch.testing.assert_close(output(model), output(toy(family)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [LoRA(places=EVERYWHERE), LoRA(), IA3()], ids=lambda m: m.spec())
@pytest.mark.parametrize("family", FAMILIES)
def test_just_the_named_layers_are_wrapped_and_train(method, family):
    model = toy(family, method)
    paths = set(method.layers(anatomy.of(model)))
    assert wrapped(model) == paths
    assert {name.partition(".lora_")[0].partition(".ia3_")[0] for name in trained(model)} == paths
    assert not [name for name in trained(model) if "base_layer" in name]


def test_loras_formula():
    model = toy("dit", LoRA(r=2, alpha=6))
    layer = stirred(model).transformer_blocks[0].attn1.to_v
    x = torch.randn(3, 32)
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert low.shape == (2, 32) and high.shape == (32, 2)
    wanted = layer.base_layer(x) + 6 / 2 * x @ low.T @ high.T
    torch.testing.assert_close(layer(x), wanted)


def test_ia3s_formula():
    block = stirred(toy("dit", IA3())).transformer_blocks[0]
    x, hidden = torch.randn(3, 32), torch.randn(3, 128)
    for layer in (block.attn1.to_k, block.attn1.to_v):
        scale = layer.ia3_l["default"].flatten()
        torch.testing.assert_close(layer(x), scale * layer.base_layer(x))
    inner = block.ff.net[2]
    torch.testing.assert_close(
        inner(hidden), inner.base_layer(inner.ia3_l["default"].flatten() * hidden)
    )


@pytest.mark.parametrize(
    "method, count",
    [
        # Queries and values, rank 16, of 28 blocks; with 102 rows of labels DiffFit's paper counts
        # 2.18M.
        (LoRA(r=16), 28 * 2 * 16 * (1152 + 1152)),
        (IA3(), 28 * (1152 + 1152 + 4608)),
        (IA3(places=["fc2"]), 28 * 4608),
        (IA3(places=["k"]), 28 * 1152),
    ],
    ids=lambda value: value.spec() if isinstance(value, pared.Conversion) else None,
)
def test_counts_of_dit_xl_2(method, count):
    model = pared.convert(presets.build("dit-xl-2"), method)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    if method == LoRA(r=16):
        assert round((count + 102 * 1152) / 1e6, 2) == 2.18


def test_diffusers_reads_a_lora_file(tmp_path):
    model = stirred(toy("sd3", LoRA(r=2, alpha=6)))
    file = save_adapter(model, tmp_path / "lora.safetensors")
    stock = toy("sd3")
    stock.load_lora_adapter(file, prefix=None, use_safetensors=True)
    torch.testing.assert_close(output(stock), output(model), rtol=0, atol=1e-6)


# With other methods -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoRA(), IA3()], ids=lambda m: m.spec())
@pytest.mark.parametrize("edit_first", [True, False])
def test_they_go_with_converted_attentions(method, edit_first):
    methods = [EDiT(), method] if edit_first else [method, EDiT()]
    model = toy("pixart", *methods)
    assert stack_of(model) == methods
    before = output(model)
    stirred(model)
    assert not torch.equal(output(model), before)


def test_two_of_one_kind_on_different_layers():
    model = stirred(toy("dit", LoRA(places=["q"]), LoRA(r=2, places=["out"])))
    layers = [path.rpartition("attn1.")[2] for path in wrapped(model) if "blocks.0." in path]
    assert sorted(layers) == ["to_out.0", "to_q"]
    wanted = output(model)
    LoRA(places=["q"]).merge(model)
    assert stack_of(model) == [LoRA(r=2, places=["out"])]
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)


def test_layers_that_are_wrapped_already_are_refused():
    with pytest.raises(InputError, match=r"ia3 replaces \S+attn1\.to_v, which lora already"):
        toy("dit", LoRA(), IA3())
    with pytest.raises(InputError, match=r"lora replaces \S+ff, which difffit already"):
        toy("dit", DiffFit(), LoRA(places=["fc1"]))


@pytest.mark.parametrize("method", [LoRA(places=["fc1"]), IA3()], ids=lambda m: m.spec())
def test_rebuilt_feed_forwards_are_refused(method):
    with pytest.raises(InputError, match=r"replaces transformer_blocks\.0\.ff, which"):
        pared.convert(toy("pixart", MultiTaskUpcycling()), method)


def test_other_layers_than_plain_ones_are_refused():
    model = toy("dit")

    class Special(nn.Linear):
        pass

    model.transformer_blocks[1].attn1.to_v = Special(32, 32)
    before = dict(model.named_modules())
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.attn1\.to_v is a Special"):
        pared.convert(model, LoRA())
    assert dict(model.named_modules()) == before


# With adapters of others --------------------------------------------------------------------------


def style(model: nn.Module, *layers: str) -> None:
    """A LoRA of somebody else's, loaded as diffusers loads one."""
    config = peft.LoraConfig(r=2, target_modules=list(layers), init_lora_weights=False)
    model.add_adapter(config, adapter_name="style")


@pytest.mark.parametrize("method", [LoRA(), IA3()], ids=lambda m: m.spec())
@pytest.mark.parametrize("layers", [("to_q", "to_v"), ("proj_out",)])
def test_an_adapter_of_others_doesnt_switch_ours_off_in_silence(method, layers, tmp_path):
    if isinstance(method, IA3) and layers != ("proj_out",):
        layers = ("add_q_proj",)  # peft puts no LoRA on a layer of (IA)^3
    model = stirred(toy("sd3", method))
    wanted, names = output(model), set(trained(model))
    style(model, *layers)
    refusal = rf"{method.info.slug} does nothing in \S+ any more, where the adapters \['style'\]"
    with pytest.raises(InputError, match=refusal):
        output(model)
    with pytest.raises(InputError, match=refusal):
        method.merge(model)
    with pytest.raises(InputError, match=r"carries adapters of peft.* merge pared's own first"):
        pared.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    assert set(method.trainable(anatomy.of(model))) == names
    save_adapter(model, tmp_path / "ours.safetensors")
    assert torch.equal(output(load_adapter(toy("sd3"), tmp_path / "ours.safetensors")), wanted)
    with pytest.warns(match="Setting active adapter to default"):
        model.delete_adapters("style")
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-6)


def test_both_work_where_both_are_switched_on():
    model = stirred(toy("sd3", LoRA()))
    ours = output(model)
    style(model, "to_q")
    model.set_adapters(["style", "default"])
    both = output(model)
    assert not torch.allclose(both, ours)
    model.transformer_blocks[0].attn.to_q.lora_B["default"].weight.data.zero_()
    assert not torch.allclose(output(model), both)


def test_ours_is_not_merged_where_another_is_on_the_same_layers():
    model = stirred(toy("sd3", LoRA()))
    style(model, "to_q")
    model.set_adapters(["style", "default"])
    with pytest.raises(
        InputError, match=r"can't be merged where another .*delete_adapters\('style"
    ):
        LoRA().merge(model)
    assert stack_of(model) == [LoRA()]


def test_merged_it_goes_with_adapters_of_others():
    model = stirred(toy("sd3", LoRA()))
    wanted = output(model)
    handle = LoRA().merge(model)
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
    style(model, "to_q")
    assert not torch.allclose(output(model), wanted)
    model.unload_lora()
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
    handle.remove()
    style(model, "to_q")
    with pytest.raises(InputError, match="lora does nothing in"):
        output(model)


def test_unloading_the_others_takes_ours_off_and_is_told(tmp_path):
    model = stirred(toy("sd3", LoRA()))
    style(model, "to_q")
    model.unload_lora()
    for use in (output, lambda model: pared.save(model, tmp_path / "model"), LoRA().merge):
        with pytest.raises(InputError, match=r"lora was taken off \S+ \(unload_lora_weights"):
            use(model)
    assert not list(tmp_path.iterdir())


def test_ours_doesnt_switch_off_that_of_others():
    model = toy("sd3")
    style(model, "add_q_proj")
    before = output(model)
    with pytest.raises(InputError, match=r"would switch off the adapter 'style'.*fuse it first"):
        pared.convert(model, LoRA())
    assert torch.equal(output(model), before) and stack_of(model) == []
    model.fuse_lora()
    model.unload_lora()
    torch.testing.assert_close(output(pared.convert(model, LoRA())), before, rtol=0, atol=1e-5)


# Settings and the package -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, message",
    [
        ("lora:r=0", "greater than or equal to 1"),
        ("lora:places=[]", "at least 1 item"),
        ('lora:places=["w"]', "'q', 'k', 'v', 'out', 'fc1' or 'fc2'"),
        ('ia3:places=["q"]', "'k', 'v' or 'fc2'"),
    ],
)
def test_bad_settings(spec, message):
    with pytest.raises(InputError, match=message):
        pared.parse(spec)


@pytest.mark.parametrize("method", [LoRA(), IA3()], ids=lambda m: m.spec())
def test_a_missing_package_is_named(method, monkeypatch):
    from pared.tuning import peft_adapter

    monkeypatch.setattr(peft_adapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'peft', .* 'pared\[adapters\]' brings it"):
        pared.convert(toy("dit"), method)


def test_listing_and_loading_the_methods_doesnt_import_peft():
    code = (
        "import sys, pared, pared.tuning.adapters; from pared import info; "
        "pared.parse('lora:r=2'), pared.parse('ia3'), pared.parse('difffit'); "
        "assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
