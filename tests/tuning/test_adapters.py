"""Adapter files, and what every adapter must do, whoever's layers it has."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention.edit import EDiT
from pared.errors import InputError
from pared.method import stack_of
from pared.tuning.adapters import load_adapter, save_adapter
from pared.tuning.difffit import DiffFit
from pared.tuning.ia3 import IA3
from pared.tuning.lora import LoRA
from tests.recipes.pipelines import pipeline
from tests.tuning.test_difffit import output, stirred, toy, trained

pytest.importorskip("peft")

METHODS = [
    DiffFit(),
    DiffFit(locations=[]),
    DiffFit(classes=3),
    LoRA(),
    LoRA(r=2, alpha=6, places=["q", "k", "v", "out", "fc1", "fc2"]),
    IA3(),
    IA3(places=["fc2"]),
]
CASES = [
    pytest.param(method, family, id=f"{method.spec()}-{family}")
    for method in METHODS
    for family in ("dit", "unet", "flux")
    if family == "dit" or not getattr(method, "classes", None)
]


@pytest.mark.parametrize("method, family", CASES)
def test_training_leaves_the_base_alone(method, family):
    model = toy(family, method)
    names, base = trained(model), toy(family).state_dict()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        output(model).square().sum().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= names
    for name in base.keys() - names:
        kept = next(n for n in (name, _wrapped(name)) if n in model.state_dict())
        assert torch.equal(model.state_dict()[kept], base[name]), f"{name} was changed"


def _wrapped(name: str) -> str:
    path, _, last = name.rpartition(".")
    return f"{path}.base_layer.{last}"


@pytest.mark.parametrize("method, family", CASES)
def test_a_file_holds_the_trained_tensors_and_nothing_else(method, family, tmp_path):
    model = stirred(toy(family, method))
    file = save_adapter(model, tmp_path / "new" / "adapter.safetensors")
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with safe_open(file, "pt") as content:
        sizes = {key: content.get_tensor(key).numel() for key in content.keys()}  # noqa: SIM118
        about = json.loads(content.metadata()["pared"])
    assert len(sizes) == len(parameters)
    assert not [key for key in sizes if "default" in key or "base_layer.weight" in key]
    assert sum(sizes.values()) == sum(p.numel() for p in parameters.values())
    # The rest is the header, a hundred bytes or two per tensor.
    header = file.stat().st_size - 4 * sum(sizes.values())
    assert 0 < header < 250 * len(sizes) + 5000
    stack = [pared.info.get(s["method"]).load()(**s["settings"]) for s in about["stack"]]
    assert stack == [method]


@pytest.mark.parametrize("method, family", CASES)
def test_adapters_are_switched_without_leakage(method, family, tmp_path):
    files, wanted = [], []
    for seed in (1, 2):
        model = stirred(toy(family, method), seed)
        files.append(save_adapter(model, tmp_path / f"{seed}.safetensors"))
        wanted.append(output(model))
    assert not torch.allclose(*wanted)
    model = toy(family)
    for number in (0, 1, 0):
        load_adapter(model, files[number])
        assert stack_of(model) == [method]
        assert torch.equal(output(model), wanted[number])


@pytest.mark.parametrize("method, family", CASES)
def test_merged_and_taken_back(method, family):
    model = stirred(toy(family, method))
    wanted = output(model)
    handle = method.merge(model)
    assert model.state_dict().keys() == toy(family).state_dict().keys()
    size = float(wanted.detach().abs().max().clamp(min=1))
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5 * size)
    handle.remove()
    assert torch.equal(output(model), wanted) and stack_of(model) == [method]


def test_two_adapters_of_one_model_share_a_file(tmp_path):
    methods = [LoRA(places=["q"]), IA3(places=["fc2"])]
    model = stirred(toy("pixart", *methods))
    file = save_adapter(model, tmp_path / "both.safetensors")
    again = load_adapter(toy("pixart"), file)
    assert stack_of(again) == methods
    assert torch.equal(output(again), output(model))


def test_onto_a_converted_base(tmp_path):
    model = stirred(toy("pixart", EDiT(), DiffFit()))
    file = save_adapter(model, tmp_path / "adapter.safetensors")
    base = toy("pixart", EDiT())
    assert torch.equal(output(load_adapter(base, file)), output(model))
    assert stack_of(base) == [EDiT(), DiffFit()]
    # Its convolutions have biases, which trained.
    with pytest.raises(InputError, match=r"processor.*the model doesn't train"):
        load_adapter(toy("pixart"), file)


def test_a_pipeline_takes_one(tmp_path):
    tuned = pipeline("pixart")
    pared.convert(tuned, DiffFit())
    wanted = output(stirred(tuned.transformer))
    file = save_adapter(tuned, tmp_path / "adapter.safetensors")
    again = pipeline("pixart")
    assert load_adapter(again, file) is again
    assert torch.equal(output(again.transformer), wanted)
    pared.save(again, tmp_path / "model")
    assert torch.equal(output(pared.load(tmp_path / "model").transformer), wanted)


# What is refused ----------------------------------------------------------------------------------


def test_a_model_without_an_adapter(tmp_path):
    with pytest.raises(InputError, match="carries no adapter"):
        save_adapter(toy("pixart", EDiT()), tmp_path / "adapter.safetensors")


def test_a_place_that_cant_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't be written .* choose another place"):
        save_adapter(toy("dit", DiffFit()), tmp_path / "file" / "adapter.safetensors")


def _assert_refused(model, file, message):
    modules, weights = dict(model.named_modules()), dict(model.state_dict())
    with pytest.raises(InputError, match=message):
        load_adapter(model, file)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())


def test_files_that_dont_fit(tmp_path):
    file = save_adapter(stirred(toy("dit", DiffFit())), tmp_path / "adapter.safetensors")
    _assert_refused(toy("pixart"), file, "adapts a DiTTransformer2DModel; .* a PixArtTransformer2D")
    _assert_refused(
        toy("dit", LoRA()), file, "holds difffit and the model carries lora; .* a fresh base"
    )
    torch.manual_seed(0)
    wide = presets.get("toy:dit").denoiser.make(num_attention_heads=4)
    _assert_refused(wide, file, r"has shape \(32,\), the model needs \(64,\)")
    deep = presets.get("toy:dit").denoiser.make(num_layers=3)
    _assert_refused(deep, file, r"'transformer_blocks\.2\.\S+' is missing there")
    _assert_refused(toy("dit"), tmp_path / "none.safetensors", "can't be read as an adapter")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    _assert_refused(toy("dit"), tmp_path / "other.safetensors", "isn't an adapter that pared saved")
    file.write_bytes(file.read_bytes()[:-100])
    _assert_refused(toy("dit"), file, "can't be read as an adapter")


def test_layers_of_a_site_by_role():
    """The anatomy names the same layers that the stock classes have."""
    for family in ("dit", "pixart", "sd3", "unet", "flux"):
        model = toy(family)
        found = anatomy.of(model)
        for site in found.sites():
            attention = site.kind.endswith("attention")
            for role in ("q", "k", "v", "out"):
                assert bool(found.linear_layers(site, role)) == attention, (site.path, role)
            for role in ("fc1", "fc2"):
                assert bool(found.linear_layers(site, role)) == (site.kind == "feed_forward")
            for role in ("q", "k", "v", "out", "fc1", "fc2"):
                for path in found.linear_layers(site, role):
                    assert isinstance(model.get_submodule(path), torch.nn.Linear)
