"""Saving and loading: same outputs bit for bit, and every damage named in a sentence."""

import copy
import json
import os
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel, WanTransformer3DModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import nn

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.method import stack_of
from tests.cli import toy_pipeline


def toy(dtype: torch.dtype = torch.float32, *methods: str):
    model = presets.build("toy:pixart", device="cpu", dtype=dtype)
    return pared.convert(model, *(pared.parse(m) for m in methods)) if methods else model


def output(model) -> torch.Tensor:
    family = anatomy.of(model)
    with torch.no_grad():
        return family.denoise(model, *family.example(generator=torch.Generator().manual_seed(3)))


def small_output(model) -> torch.Tensor:
    family = anatomy.of(model)
    seed = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return family.run(model, *family.example(generator=seed, **family.brief))


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


# Types --------------------------------------------------------------------------------------------


def types(pipeline) -> dict[str, torch.dtype]:
    return {n: p.dtype for n, p in pipeline.components.items() if isinstance(p, nn.Module)}


def painted(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    found = pipeline("a", num_inference_steps=1, generator=seed, output_type="pt", **size)
    return found.images


@pytest.fixture
def pipeline(tmp_path):
    return pared.load(toy_pipeline.write(tmp_path / "pipeline"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_ordinary_pipeline_of_half_precision_comes_as_it_was_saved_and_paints(
    pipeline, tmp_path, dtype
):
    pipeline.to(dtype).save_pretrained(tmp_path / "half")
    again = pared.load(tmp_path / "half")
    assert set(types(again).values()) == {dtype}
    # Tables that aren't saved are as exact as ever; `to` had rounded them with the weights.
    assert torch.allclose(painted(again), painted(pipeline), atol=0.05)
    assert set(types(pared.load(tmp_path / "half", torch.float32)).values()) == {torch.float32}


@pytest.mark.parametrize("by", ["pared", "diffusers"])
@pytest.mark.parametrize("methods", [[], ["edit"]])
def test_each_part_of_a_pipeline_keeps_its_own_type(pipeline, tmp_path, by, methods):
    pared.convert(pipeline, *map(pared.parse, methods))
    pipeline.transformer.to(torch.bfloat16)
    pipeline.text_encoder.to(torch.bfloat16)
    pared.save(pipeline, tmp_path / "mixed")
    if by == "diffusers":  # and whoever tells nothing of types
        about = json.loads((tmp_path / "mixed" / "pared.json").read_text())
        (tmp_path / "mixed" / "pared.json").write_text(json.dumps(about | {"dtype": None}))
    again = pared.load(tmp_path / "mixed")
    halves = dict.fromkeys(("transformer", "text_encoder"), torch.bfloat16)
    assert types(again) == types(pipeline) == {"vae": torch.float32} | halves
    wanted = pipeline.transformer.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in again.transformer.state_dict().items())


def test_one_type_in_a_sidecar_of_earlier_versions_is_that_of_all_parts(pipeline, tmp_path):
    pipeline.text_encoder.to(torch.float16)
    pared.save(pipeline, tmp_path / "m")
    about = json.loads((tmp_path / "m" / "pared.json").read_text())
    (tmp_path / "m" / "pared.json").write_text(json.dumps(about | {"dtype": "bfloat16"}))
    assert set(types(pared.load(tmp_path / "m")).values()) == {torch.bfloat16}


def test_the_type_is_that_of_most_weights_and_not_of_a_variant(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "m")
    part = tmp_path / "m" / "vae"
    tensors = load_file(weights_file(part))
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(half, part / "diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    assert types(pared.load(tmp_path / "m"))["vae"] == torch.float32
    mostly = half | {"encoder.conv_in.weight": tensors["encoder.conv_in.weight"]}
    (part / "diffusion_pytorch_model.fp16.safetensors").unlink()
    save_file(mostly, weights_file(part), metadata={"format": "pt"})
    assert types(pared.load(tmp_path / "m"))["vae"] == torch.float16


def test_a_damaged_part_of_a_pipeline_is_named(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "m")
    path = weights_file(tmp_path / "m" / "vae")
    path.write_bytes(path.read_bytes()[:-1000])
    refused(tmp_path / "m", f"{path} is damaged")


def test_weights_that_diffusers_keeps_in_float32_stay_so(tmp_path):
    """Wan's first parameter is one of them, and tells nothing of the model's type."""
    # Large patches: few tokens in a clip of usual size.
    presets.get("toy:wan").denoiser.make(patch_size=(1, 4, 4)).save_pretrained(tmp_path / "plain")
    half = WanTransformer3DModel.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16).eval()
    wanted = {name: p.dtype for name, p in half.named_parameters()}
    assert wanted["scale_shift_table"] == torch.float32
    pared.save(half, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "pared.json").read_text())["dtype"] == "bfloat16"
    again = pared.load(tmp_path / "m", verify=True)
    assert {name: p.dtype for name, p in again.named_parameters()} == wanted
    assert torch.equal(small_output(again), small_output(half))
    again = pared.load(tmp_path / "plain", torch.bfloat16)
    assert again.scale_shift_table.dtype == torch.float32 and again.dtype == torch.bfloat16


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


def test_a_folder_that_cannot_be_swapped_in_leaves_the_old_model(tmp_path, monkeypatch):
    first = toy(torch.float32, "edit")
    pared.save(first, tmp_path / "m")
    replace = os.replace

    def only_aside(source, target):
        if Path(target) == tmp_path / "m" and not Path(source).name.endswith("-old"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", only_aside)
    with pytest.raises(InputError, match="nothing was changed there"):
        pared.save(toy(torch.float32, "sana"), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert torch.equal(output(pared.load(tmp_path / "m")), output(first))


def test_a_link_to_a_folder_stays_one(tmp_path):
    pared.save(toy(torch.float32, "edit"), tmp_path / "disk" / "m")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "m")
    pared.save(toy(torch.float32, "sana"), tmp_path / "link")
    assert stack_of(pared.load(tmp_path / "disk" / "m"))[0].info.slug == "sana"
    assert (tmp_path / "link").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "link"}
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["m"]


@pytest.mark.parametrize("methods", [[], ["edit"], ["lora:r=2"]])
def test_adapters_that_another_library_put_in_are_not_saved_until_they_are_fused(tmp_path, methods):
    from peft import LoraConfig

    model = presets.build("toy:sd3", device="cpu")
    pared.convert(model, *map(pared.parse, methods))
    pared.save(model, tmp_path / "m")
    before = small_output(model)
    settings = LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False)
    model.add_adapter(settings, adapter_name="style")
    for target in (model, torch.compile(model, backend="eager")):
        with pytest.raises(InputError, match=r"carries adapters of peft.*unload_lora_weights"):
            pared.save(target, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert torch.equal(small_output(pared.load(tmp_path / "m")), before)
    if not methods:
        model.fuse_lora()
        model.unload_lora()
        fused = pared.load(pared.save(model, tmp_path / "m"))
        assert torch.equal(small_output(fused), small_output(model))
        assert not torch.allclose(small_output(fused), before)


def test_adapters_of_a_pipelines_part_are_not_saved(pipeline, tmp_path):
    from peft import LoraConfig

    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="the text_encoder carries adapters of peft"):
        pared.save(pipeline, tmp_path / "m")
    assert not (tmp_path / "m").exists()


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
