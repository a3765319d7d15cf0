"""The families of speech encoders, on toy models of the real classes."""

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import nn
from transformers.models.whisper import modeling_whisper

from pared import anatomy
from pared.anatomy import presets
from pared.anatomy.speech import Frames, NoPositions
from pared.errors import InputError


@dataclass(frozen=True)
class Expected:
    """What the anatomy must find in a toy."""

    family: str
    encoder: str
    sites: dict[str, int]
    output: tuple[int, ...]


EXPECTED = {
    "toy:wav2vec2": Expected(
        "wav2vec2", "wav2vec2.encoder", {"self_attention": 2, "feed_forward": 2}, (2, 25, 32)
    ),
    "toy:conformer": Expected(
        "conformer",
        "wav2vec2_conformer.encoder",
        {"self_attention": 2, "feed_forward": 4, "convolution": 2},
        (2, 25, 32),
    ),
    "toy:whisper": Expected("whisper", "model.encoder", {"self_attention": 2}, (2, 4, 64)),
}
NAMES = tuple(EXPECTED)
# Classes of other heads and of none, by the toy whose configuration they take.
OTHERS = {
    "Wav2Vec2Model": "toy:wav2vec2",
    "Wav2Vec2ForPreTraining": "toy:wav2vec2",
    "HubertModel": "toy:wav2vec2",
    "HubertForCTC": "toy:wav2vec2",
    "Wav2Vec2ConformerModel": "toy:conformer",
    "Wav2Vec2ConformerForPreTraining": "toy:conformer",
    "WhisperModel": "toy:whisper",
    "WhisperEncoder": "toy:whisper",
}


def toy(name: str, **config) -> nn.Module:
    """A toy, or another class with the toy's configuration."""
    torch.manual_seed(0)
    if name not in OTHERS:
        return presets.get(name).recogniser.make(**config).eval()
    # Its encoder alone is no class that transformers shows.
    module = modeling_whisper if name == "WhisperEncoder" else transformers
    cls = getattr(module, name)
    settings = presets.get(OTHERS[name]).recogniser.config | config
    return cls(cls.config_class(**settings)).eval()


@torch.no_grad()
def call(model: nn.Module, batch: int = 2) -> torch.Tensor:
    family = anatomy.of(model)
    generator = torch.Generator().manual_seed(0)
    return family.run(model, *family.example(batch, **family.sizes[0], generator=generator))


# Finding ------------------------------------------------------------------------------------------


def test_every_toy_family_and_class_is_in_the_tables():
    names = presets.names("speech encoder")
    assert set(NAMES) == {name for name in names if name.startswith("toy:")}
    found = {n: f for n, f in anatomy.families().items() if f.kind == "speech encoder"}
    assert {family.name for family in found.values()} == {e.family for e in EXPECTED.values()}
    heads = {presets.get(name).recogniser.cls.rpartition(".")[2] for name in NAMES}
    assert set(found) == heads | set(OTHERS)


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_those_expected_and_paths_lead_to_them(name):
    model, expected = toy(name), EXPECTED[name]
    family = anatomy.of(model)
    assert (family.name, family.encoder) == (expected.family, expected.encoder)
    kinds = [site.kind for site in family.sites()]
    assert {kind: kinds.count(kind) for kind in kinds} == expected.sites
    assert {site.stream for site in family.sites()} == {"audio"}
    for block in family.blocks:
        assert model.get_submodule(block.path) is block.module
        assert block.returns == ("audio",)
        for site in block.sites:
            assert model.get_submodule(site.path) is site.module
            assert site.block == block.index
    for site in family.sites("self_attention"):
        assert (site.width, site.heads) == (family.width, family.heads) == (32, 2)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_in_the_order_of_execution_and_say_what_they_carry(name):
    model = toy(name)
    ran = []
    for block in anatomy.of(model).blocks:

        def hook(module, args, kwargs, output, block=block):
            (tokens,), (made,) = block.tokens(args, kwargs), block.outputs(output)
            assert tokens.shape == made.shape
            ran.append(block.index)

        block.module.register_forward_hook(hook, with_kwargs=True)
    call(model)
    assert ran == [0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_linear_layers_by_role(name):
    family = anatomy.of(toy(name))
    for site in family.sites("self_attention"):
        for role in ("q", "k", "v", "out"):
            (path,) = family.linear_layers(site, role)
            assert family.model.get_submodule(path).out_features == 32
    for site in family.sites("feed_forward"):
        (first,), (second,) = (family.linear_layers(site, role) for role in ("fc1", "fc2"))
        assert family.model.get_submodule(first).out_features == 64
        assert family.model.get_submodule(second).in_features == 64


def test_every_addition_to_the_frames_is_a_branch():
    branches = [b.path.rpartition(".")[2] for b in anatomy.of(toy("toy:conformer")).branches]
    assert branches == ["ffn1", "self_attn", "conv_module", "ffn2"] * 2


def test_models_are_found_inside_wrappers():
    model = toy("toy:wav2vec2")
    assert anatomy.of(torch.compile(model)).model is model


def test_what_only_denoisers_have_is_refused_in_a_sentence():
    family = anatomy.of(toy("toy:whisper"))
    with pytest.raises(InputError, match=r"whisper model has no 'denoise': it is a speech encoder"):
        family.denoise(family.model, None, None, {})
    assert not hasattr(family, "denoise")


def test_an_error_in_a_property_is_not_taken_for_its_absence():
    family = anatomy.of(toy("toy:whisper"))
    del family.model.model.encoder.layers
    with pytest.raises(AttributeError, match=r"WhisperEncoder has no attribute .layers"):
        _ = family.blocks


# Calling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_finite_and_a_batch_equals_its_samples(name):
    model = toy(name)
    assert call(model).shape == EXPECTED[name].output
    assert call(model.bfloat16()).isfinite().all()


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads(name):
    model = toy(name)
    family = anatomy.of(model)
    assert family.name == EXPECTED[OTHERS[name]].family
    assert call(model).isfinite().all()
    assert len(family.blocks) == 2


@pytest.mark.parametrize("name", NAMES)
def test_examples_on_the_meta_device(name):
    model = presets.build(name)
    family = anatomy.of(model)
    example = family.example(2, **family.sizes[0])
    output = family.run(model, *example)
    assert output.device.type == "meta"
    assert output.shape == EXPECTED[name].output


def test_an_example_is_padded_where_there_are_several():
    family = anatomy.of(toy("toy:wav2vec2"))
    audio, mask = family.example(2, generator=torch.Generator().manual_seed(0))
    assert audio.shape == mask.shape == (2, 16_000)
    assert mask.sum(dim=1).tolist() == [16_000, 12_000]
    assert not audio[1, 12_000:].any()


# Padding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy:wav2vec2", "toy:conformer", "Wav2Vec2Model"])
def test_frames_know_the_padding_of_every_call(name):
    model = toy(name)
    family = anatomy.of(model)
    frames = family.frames()
    assert family.frames() is frames
    before = call(model)
    # 25 frames of 2000 samples, one for 80; 1500 samples make 19.
    assert frames.valid.sum(dim=1).tolist() == [25, 19]
    twin = copy.deepcopy(model)
    assert anatomy.of(twin).frames() is not frames
    with torch.no_grad():
        twin(torch.randn(1, 800))
    assert anatomy.of(twin).frames().valid is None
    assert frames.valid is not None
    assert torch.equal(call(model), before)


def test_frames_read_a_mask_given_by_position():
    frames, mask = Frames(), torch.ones(1, 3, dtype=torch.bool)
    frames(nn.Identity(), (torch.zeros(1, 3, 2), mask), {})
    assert frames.valid is mask


def test_whisper_has_no_padding():
    model = toy("toy:whisper")
    frames = anatomy.of(model).frames()
    model(torch.randn(1, 16, 60), torch.ones(1, 60), decoder_input_ids=torch.ones(1, 2).long())
    assert frames.valid is None


# Positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_positions_of_conformers(kind):
    model = toy("toy:conformer", position_embeddings_type=kind)
    family = anatomy.of(model)
    path = "wav2vec2_conformer.encoder.embed_positions"
    assert family.positions == (path if kind else "")
    assert family.rotates_inputs == (kind == "rotary")
    assert (family.model.get_submodule(path[:-16]).embed_positions is None) == (kind is None)
    family.drop_positions()
    assert model.get_submodule(path[:-16]).embed_positions is None


@pytest.mark.parametrize("name", ["toy:wav2vec2", "toy:whisper"])
def test_dropped_positions_add_nothing(name):
    model = toy(name)
    family = anatomy.of(model)
    before = call(model)
    family.drop_positions()
    assert isinstance(model.get_submodule(family.positions), NoPositions)
    dropped = call(model)
    assert not torch.equal(dropped, before)
    if name == "toy:whisper":
        silent = toy(name)
        silent.model.encoder.embed_positions.weight.data.zero_()
        assert torch.equal(call(silent), dropped)


# Presets ------------------------------------------------------------------------------------------


def test_published_sizes_in_millions():
    """As their papers and model cards have them: 95, 317, 37 x 2 ..."""
    sizes = {
        name: presets.get(name).main.parameters / 1e6
        for name in presets.names("speech encoder")
        if not name.startswith("toy:")
    }
    assert {name: round(size, 1) for name, size in sizes.items()} == {
        "wav2vec2-base": 94.4,
        "wav2vec2-large": 315.5,
        "conformer-large": 618.6,
        "conformer-rope-large": 593.4,
        "whisper-base": 72.6,
        "whisper-large-v3": 1543.5,
    }


def test_parameters_of_the_default_conformer():
    """The card's: 179.73 M with relative positions, 172.63 M with rotary ones or none."""
    counts = {}
    for kind in ("relative", "rotary", None):
        config = transformers.Wav2Vec2ConformerConfig(position_embeddings_type=kind)
        with torch.device("meta"):
            model = transformers.Wav2Vec2ConformerModel(config)
        attentions = [s.module for s in anatomy.of(model).sites("self_attention")]
        counts[kind] = [
            round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 2)
            for modules in ([model], attentions)
        ]
    assert counts == {"relative": [179.73, 35.44], "rotary": [172.63, 28.35], None: [172.63, 28.35]}


def test_a_preset_with_fewer_blocks():
    assert len(anatomy.of(presets.build("wav2vec2-base", layers=2)).blocks) == 2
    assert len(anatomy.of(presets.build("whisper-base", layers=2)).blocks) == 2


def test_presets_of_one_kind():
    assert "wav2vec2-base" in presets.names()
    assert "wav2vec2-base" not in presets.names("denoiser")
    assert "pixart-sigma" not in presets.names("speech encoder")
    with pytest.raises(InputError, match="no component 'vae'; it has recogniser"):
        presets.build("wav2vec2-base", component="vae")


# Elsewhere ----------------------------------------------------------------------------------------


def test_no_bill_and_no_bench_is_made_of_a_recogniser():
    import pared

    with pytest.raises(InputError, match="toy:wav2vec2 is a speech encoder; a bill is for"):
        pared.bill("toy:wav2vec2")
    with pytest.raises(InputError, match="Wav2Vec2ForCTC is a speech encoder; the bench runs"):
        pared.bench("toy:wav2vec2", {})


def test_methods_for_denoisers_refuse_a_recogniser_by_its_kind():
    import pared

    with pytest.raises(InputError, match=r"edit can't be used on .*: it is a speech encoder, and"):
        pared.convert(toy("toy:wav2vec2"), pared.EDiT())
    with pytest.raises(InputError, match=r"re-ttention can't be used on .*: it is a speech enc"):
        pared.apply(toy("toy:conformer"), pared.parse("re-ttention"))
    with pytest.raises(InputError, match=r"rope-asr can't be used on .*: it is a denoiser, and"):
        pared.convert(presets.build("toy:dit"), pared.parse("rope-asr"))


def test_the_command_line_converts_a_recogniser_and_checks_methods_on_it(tmp_path):
    from click.testing import CliRunner

    import pared
    from pared.cli import main

    runner, folder = CliRunner(), str(tmp_path / "m")
    spec = ["--with", "rope-asr"]
    done = runner.invoke(main, ["convert", "toy:conformer", *spec, "-o", folder])
    assert done.exit_code == 0, done.output
    assert "layers.{0-1}.self_attn" in done.output
    assert pared.load(folder).pared_stack == [pared.parse("rope-asr")]
    # A second method on the saved folder, which the rehearsal reads without its weights.
    twice = ["convert", folder, "--with", "summarymixing-asr", "-o", str(tmp_path / "n")]
    refused = runner.invoke(main, twice)
    assert refused.exit_code == 2 and "which rope-asr already replaces" in refused.output
