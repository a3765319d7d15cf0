"""Saving and loading: same outputs bit for bit, and every damage named in a sentence."""

import copy
import json
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.method import stack_of


def toy(dtype: torch.dtype = torch.float32, *methods: str):
    model = presets.build("toy:pixart", device="cpu", dtype=dtype)
    return pared.convert(model, *(pared.parse(m) for m in methods)) if methods else model


def output(model) -> torch.Tensor:
    family = anatomy.of(model)
    with torch.no_grad():
        return family.denoise(model, *family.example(generator=torch.Generator().manual_seed(3)))


def weights_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["10GB", "40KB"])
def test_round_trip_is_exact(tmp_path, dtype, shard):
    model = toy(dtype, "edit:r=8,layers=[0]", "linfusion:layers=[1]")
    pared.save(model, tmp_path / "m", max_shard_size=shard)
    again = pared.load(tmp_path / "m")
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard == "40KB")
    assert [m.spec() for m in stack_of(again)] == ["edit:layers=[0],r=8", "linfusion:layers=[1]"]
    assert torch.equal(output(again), output(model))
    assert not again.training


def test_dtype_can_be_changed_while_loading(tmp_path):
    pared.save(toy(torch.float32, "edit"), tmp_path / "m")
    again = pared.load(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_an_ordinary_diffusers_folder_loads(tmp_path):
    model = toy()
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(output(pared.load(tmp_path / "plain")), output(model))


def test_a_saved_unconverted_model_opens_in_plain_diffusers(tmp_path):
    model = toy()
    pared.save(model, tmp_path / "m")
    assert torch.equal(
        output(PixArtTransformer2DModel.from_pretrained(tmp_path / "m")), output(model)
    )


def test_plain_diffusers_names_what_it_cannot_use(tmp_path, caplog):
    pared.save(toy(torch.float32, "edit"), tmp_path / "m")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        PixArtTransformer2DModel.from_pretrained(tmp_path / "m")
    finally:
        logging.disable_propagation()
        logging.set_verbosity(verbosity)
    assert "processor.query_fusion" in caplog.text


def test_wrapped_models_save_as_what_they_wrap(tmp_path):
    model = toy(torch.float32, "edit")
    pared.save(torch.compile(model, backend="eager"), tmp_path / "m")
    assert torch.equal(output(pared.load(tmp_path / "m")), output(model))


def test_conversion_after_peft_adapters_keeps_their_effect():
    from peft import LoraConfig, inject_adapter_in_model

    model = toy()
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), model
    )
    pared.convert(model, pared.EDiT())
    with_adapter = output(model)
    for module in model.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(False)
    assert not torch.allclose(with_adapter, output(model))


def test_saving_replaces_a_model_and_leaves_no_traces(tmp_path):
    pared.save(toy(torch.float32, "edit"), tmp_path / "m")
    pared.save(toy(torch.float32, "sana"), tmp_path / "m")
    assert stack_of(pared.load(tmp_path / "m"))[0].info.slug == "sana"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# What goes wrong --------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    return pared.save(toy(torch.float32, "edit"), tmp_path / "m")


def refused(folder: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        pared.load(folder)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    refused(tmp_path / "nothing", "there is no folder")


def test_not_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, "is not a model")


def test_truncated_weights(saved):
    path = weights_file(saved)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(saved, "checksum differs")


def test_truncated_weights_without_a_sidecar(saved):
    (saved / "pared.json").unlink()
    path = weights_file(saved)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(saved, "is damaged")


def test_tampered_weights(saved):
    path = weights_file(saved)
    data = bytearray(path.read_bytes())
    data[-5] ^= 0xFF
    path.write_bytes(data)
    refused(saved, "checksum differs")


def _edit_weights(saved: Path, change) -> None:
    """Change the weights and forget their checksums, as another tool would."""
    path = weights_file(saved)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    sidecar = json.loads((saved / "pared.json").read_text())
    (saved / "pared.json").write_text(json.dumps(sidecar | {"files": {}}))


def test_missing_weight(saved):
    name = "transformer_blocks.0.attn1.processor.key_compressor.weight"
    _edit_weights(saved, lambda t: t.pop(name))
    refused(saved, f"lacks the weight '{name}'")


def test_unknown_weight(saved):
    _edit_weights(saved, lambda t: t.update(surplus=torch.zeros(2)))
    refused(saved, "'surplus' that the model doesn't know")


def test_wrong_shape(saved):
    _edit_weights(saved, lambda t: t.update({"proj_out.bias": torch.zeros(2)}))
    refused(saved, "proj_out.bias.*has shape")


def test_pickled_weights(saved):
    weights_file(saved).unlink()
    (saved / "pared.json").unlink()
    (saved / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(saved, "is a pickle")


def test_broken_sidecar(saved):
    (saved / "pared.json").write_text("{")
    refused(saved, "can't be read")


def test_unknown_method_in_sidecar(saved):
    sidecar = json.loads((saved / "pared.json").read_text())
    sidecar["stack"][0]["method"] = "edti"
    (saved / "pared.json").write_text(json.dumps(sidecar))
    refused(saved, "did you mean edit")


def test_saving_over_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a model"):
        pared.save(toy(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        pared.save(toy(), tmp_path / "file" / "model")


def test_a_full_disk_leaves_the_old_model(tmp_path):
    first = toy(torch.float32, "edit")
    pared.save(first, tmp_path / "m")
    # A limit on file size makes the system refuse to write, just as a full disk does.
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match="could not be written"):
            pared.save(toy(torch.float32, "sana"), tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert torch.equal(output(pared.load(tmp_path / "m")), output(first))


def test_copies_of_a_converted_model_are_independent():
    model = toy(torch.float32, "edit")
    twin = copy.deepcopy(model)
    before = output(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(output(model), before)


def test_nothing_warns_on_load(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pared.load(saved)


def test_verify_compares_with_the_output_at_saving(saved):
    pared.load(saved, verify=True)
    _edit_weights(saved, lambda t: t["proj_out.bias"].add_(1))
    pared.load(saved)
    with pytest.raises(InputError, match="when it was saved"):
        pared.load(saved, verify=True)


# Recognisers of transformers --------------------------------------------------------------------


def recogniser(name: str, *methods: str, dtype: torch.dtype = torch.float32):
    model = presets.build(f"toy:{name}", device="cpu").to(dtype)
    return pared.convert(model, *(pared.parse(m) for m in methods)).eval() if methods else model


def heard(model) -> torch.Tensor:
    family = anatomy.of(model)
    seed = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return family.run(model, *family.example(2, **family.sizes[0], generator=seed))


SPEECH = ("wav2vec2", "conformer", "whisper")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPEECH)
def test_a_converted_recogniser_comes_back_to_the_bit(tmp_path, name, dtype):
    methods = ("rope-asr:layers=[0]", "summarymixing-asr:mode=lite,layers=[1]")
    model = recogniser(name, *methods, dtype=dtype)
    pared.save(model, tmp_path / "m", max_shard_size="40KB")
    assert (tmp_path / "m" / "config.json").exists()
    again = pared.load(tmp_path / "m", verify=dtype == torch.float32)
    assert sorted(m.info.slug for m in stack_of(again)) == ["rope-asr", "summarymixing-asr"]
    assert type(again) is type(model) and not again.training
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert torch.equal(heard(again), heard(model))
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == trains


def test_what_is_not_saved_is_computed_again(tmp_path):
    """The table of relative positions, and the output layer that is the decoder's embedding."""
    model = recogniser("conformer", "summarymixing-asr:layers=[0]")
    again = pared.load(pared.save(model, tmp_path / "c"))
    table = "wav2vec2_conformer.encoder.embed_positions.pe"
    assert torch.equal(again.get_buffer(table), model.get_buffer(table))
    again = pared.load(pared.save(recogniser("whisper", "rope-asr"), tmp_path / "w"))
    assert again.proj_out.weight is again.model.decoder.embed_tokens.weight
    assert all(p.device.type == "cpu" for p in again.parameters())


@pytest.mark.parametrize("name", SPEECH)
def test_an_ordinary_transformers_folder_loads_and_is_saved_as_one(tmp_path, name):
    model = recogniser(name)
    model.save_pretrained(tmp_path / "plain")
    loaded = pared.load(tmp_path / "plain")
    assert torch.equal(heard(loaded), heard(model))
    assert {p.dtype for p in pared.load(tmp_path / "plain", torch.bfloat16).parameters()} == {
        torch.bfloat16
    }
    pared.save(loaded, tmp_path / "m")
    assert torch.equal(heard(type(model).from_pretrained(tmp_path / "m").eval()), heard(model))
    assert torch.equal(heard(pared.load(tmp_path / "m", verify=True)), heard(model))


def _masking():
    """The toy wav2vec 2.0 with the weight that masked frames get in training."""
    torch.manual_seed(0)
    return presets.get("toy:wav2vec2").recogniser.make(mask_time_prob=0.05).eval()


def _changed_folder(folder: Path, change) -> Path:
    """An ordinary folder of that toy, its weights changed as another tool would."""
    _masking().save_pretrained(folder)
    tensors = load_file(weights_file(folder))
    change(tensors)
    save_file(tensors, weights_file(folder), metadata={"format": "pt"})
    return folder


def test_published_names_and_gaps_of_older_weights_are_understood(tmp_path):
    def older(tensors):
        stem = "wav2vec2.encoder.pos_conv_embed.conv"
        for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
            tensors[f"{stem}.{old}"] = tensors.pop(f"{stem}.parametrizations.weight.{new}")
        del tensors["wav2vec2.masked_spec_embed"]

    folder = _changed_folder(tmp_path / "m", older)
    model = pared.load(folder)
    assert torch.equal(heard(model), heard(_masking()))
    pared.save(pared.convert(model, pared.parse("rope-asr")), tmp_path / "again")
    assert torch.equal(heard(pared.load(tmp_path / "again")), heard(model.eval()))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("lm_head.weight"), "lacks the weight 'lm_head.weight'"),
        (lambda t: t.update(extra=torch.zeros(2)), "doesn't know, 'extra'"),
        (lambda t: t.update({"lm_head.bias": torch.zeros(2)}), "another shape .* 'lm_head.bias'"),
    ],
)
def test_an_ordinary_folder_must_fit(tmp_path, change, words):
    refused(_changed_folder(tmp_path / "m", change), words)


def test_a_converted_recognisers_weights_must_fit(tmp_path):
    pared.save(recogniser("wav2vec2", "summarymixing-asr"), tmp_path / "m")
    name = "wav2vec2.encoder.layers.0.attention.mixer.norm_s.weight"
    _edit_weights(tmp_path / "m", lambda t: t.pop(name))
    refused(tmp_path / "m", f"lacks the weight '{name}'")
    pared.save(recogniser("wav2vec2", "summarymixing-asr"), tmp_path / "m")
    _edit_weights(tmp_path / "m", lambda t: t.update(surplus=torch.zeros(2)))
    refused(tmp_path / "m", "'surplus' that the model doesn't know")


def test_a_damaged_or_pickled_recogniser_is_refused(tmp_path):
    recogniser("wav2vec2").save_pretrained(tmp_path / "m")
    path = weights_file(tmp_path / "m")
    path.write_bytes(path.read_bytes()[:-1000])
    refused(tmp_path / "m", "can't be opened as a model")
    path.unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(tmp_path / "m", "is a pickle")


@pytest.mark.parametrize("name", ["Wav2Vec9ForCTC", "pipeline", "Wav2Vec2Config"])
def test_a_folder_that_names_no_model_is_refused(tmp_path, name):
    recogniser("wav2vec2").save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    refused(tmp_path / "m", f"holds a {name}, which transformers doesn't have")
