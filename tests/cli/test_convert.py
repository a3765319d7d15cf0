"""`pared convert`: a folder that loads, a summary that is right, and everything refused in time."""

import json

import pytest
import torch
import transformers

import pared
from pared.anatomy import presets
from pared.cli.convert import _in_short
from pared.method import stack_of
from pared.speech.recognition import load
from pared.worlds.speech import audio
from tests.speech import recognisers


def test_a_preset(run, tmp_path):
    result = run("convert", "toy:dit", "--with", "edit:r=8", "-o", "out/student")
    assert result.exit_code == 0, result.output
    before = sum(p.numel() for p in presets.build("toy:dit").parameters())
    model = pared.load(tmp_path / "out" / "student")
    after = sum(p.numel() for p in model.parameters())
    assert stack_of(model) == [pared.parse("edit:r=8")]
    assert result.stdout.splitlines() == [
        "toy:dit: DiTTransformer2DModel, 60.8 K parameters",
        "edit:r=8 replaces transformer_blocks.{0-1}.attn1 (2 places)",
        f"out/student: {after / 1000:.3g} K parameters ({after / before - 1:+.1%})",
    ]


def test_a_folder_in_bfloat16_with_a_second_method(run, tmp_path):
    run("convert", "toy:sd3", "--with", "edit:layers=[0]", "-o", "one")
    result = run("convert", "one", "--with", "edit:layers=[0]", "--dtype", "bfloat16", "-o", "two")
    assert result.exit_code == 0, result.output
    assert "(+0.0%)" in result.stdout, "what the model already carries isn't done again"
    model = pared.load(tmp_path / "two")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(stack_of(model)) == 1


def test_a_pipeline_stays_a_pipeline(run, tmp_path, pipeline):
    result = run("convert", pipeline, "--with", "edit", "-o", "student")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "student" / "model_index.json").exists()
    steps = json.loads((tmp_path / "student" / "pared.json").read_text())["stack"]
    assert [(step["method"], step["target"]) for step in steps] == [("edit", "transformer")]


@pytest.mark.parametrize("together", [False, True])
def test_a_recogniser_keeps_its_ears_and_letters(run, tmp_path, together):
    """In the place of the model that it came from, too; extractors may be a processor's part."""
    pytest.importorskip("soundfile")
    recogniser = recognisers.conformer()
    recogniser.save(tmp_path / "model")
    if together:
        (tmp_path / "model" / "preprocessor_config.json").unlink()
        transformers.Wav2Vec2Processor(recogniser.extractor, recogniser.tokenizer).save_pretrained(
            tmp_path / "model"
        )
    (tmp_path / "model" / "notes.txt").write_text("")
    known = {path.name for path in (tmp_path / "model").iterdir()} - {"notes.txt"}
    audio.write(tmp_path / "x.wav", recognisers.noise(16000))
    for output in ("student", "model"):
        result = run("convert", "model", "--with", "rope-asr", "-o", output)
        assert result.exit_code == 0, result.output
        assert {path.name for path in (tmp_path / output).iterdir()} == known | {"pared.json"}
        assert stack_of(load(tmp_path / output).model) == [pared.parse("rope-asr")]
        result = run("transcribe", "x.wav", "--model", output)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "words, part",
    [
        (["toy:dit", "-o", "x"], "missing option '--with' (see `pared convert --help`)."),
        (["toy:dit", "--with", "edit"], "missing option '-o' / '--output'"),
        (["toy:dit", "--with", "edti", "-o", "x"], "did you mean edit"),
        (
            ["toy:dit", "--with", "edit:rr=2", "-o", "x"],
            "edit has no setting 'rr'; did you mean r?",
        ),
        (["toy:dit", "--with", "edit:r=0", "-o", "x"], "edit: r=0 doesn't work"),
        (["toy:dit", "--with", "edit:r", "-o", "x"], "'r' has no value"),
        (["toy:dit", "--with", "edit:key=none", "-o", "x"], "different numbers of tokens"),
        (["toy:dit", "--with", "edit:r=5", "-o", "x"], "r=5 doesn't divide the width 32"),
        (["toy:dit", "--with", "edit:layers=[9]", "-o", "x"], "layers=[9]"),
        (["toy:flux", "--with", "edit", "-o", "x"], "edit can't be used on FluxTransformer2DModel"),
        (
            ["toy:dit", "--with", "edit", "--with", "linfusion", "-o", "x"],
            "linfusion replaces transformer_blocks.0.attn1, which edit already replaces",
        ),
        (["toy:dti", "--with", "edit", "-o", "x"], "did you mean toy:dit"),
        (["house:vae", "--with", "edit", "-o", "x"], "pared can't read a AutoencoderKL"),
        (["toy:dit", "--with", "edit", "-o", "x", "--dtype", "int8"], "'int8' is not one of"),
        (["toy:dit", "--with", "edit", "-o", "notes.txt"], "notes.txt is a file"),
        (["toy:dit", "--with", "edit", "-o", "notes.txt/x"], "notes.txt is a file"),
        (["toy:dit", "--with", "edit", "-o", "photos"], "holds something that is not a model"),
    ],
)
def test_refusals(refused, tmp_path, words, part):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    assert part in refused("convert", *words)


def test_nothing_is_loaded_before_all_is_checked(refused, monkeypatch):
    def loaded(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr("pared.cli.models.Source.load", loaded)
    refused("convert", "toy:dit", "--with", "edit:r=5", "-o", "x")
    refused("convert", "toy:flux", "--with", "edit", "-o", "x")


@pytest.mark.parametrize(
    "sites, text",
    [
        (["blocks.3.attn"], "blocks.3.attn"),
        ([f"blocks.{i}.attn" for i in (0, 1, 2, 5)], "blocks.{0-2,5}.attn (4 places)"),
        (["mid.attn", "a.0.b.1.c"], "a.0.b.1.c, mid.attn (2 places)"),
        (["a.0.b.0.c", "a.0.b.1.c", "a.1.b.0.c"], "a.0.b.{0-1}.c, a.1.b.0.c (3 places)"),
        (["guidance"], "guidance"),
    ],
)
def test_sites_in_short(sites, text):
    assert _in_short(sites) == text
