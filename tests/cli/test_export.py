"""`pared export`: the streaming step with its state, and what can't be exported."""

from pathlib import Path

import pytest
import torch

from pared.speech.streaming_pse import enrolment
from pared.speech.streaming_pse.method_checks import noise, toy


@pytest.fixture(scope="module")
def enhancer(tmp_path_factory) -> Path:
    """The folder of a toy enhancer."""
    folder = tmp_path_factory.mktemp("enhancer") / "model"
    toy(layers=1).save_pretrained(folder)
    return folder


def test_the_file_enhances_as_its_help_says(run, enhancer, tmp_path):
    """Nothing but onnxruntime, zeros for the first state, and an enrolment's file."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime
    from safetensors.numpy import load_file

    result = run("export", enhancer, "-o", "new/step.onnx")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("new/step.onnx: 0.")
    assert "32 samples a hop, 4 ms behind the sound, 5 tensors of state" in result.stdout

    model = toy(layers=1)
    told = enrolment.enrol(model, noise(32000))
    enrolment.save(tmp_path / "me.safetensors", model, told)
    session = onnxruntime.InferenceSession(str(tmp_path / "new" / "step.onnx"))
    shapes = {each.name: each for each in session.get_inputs() if each.name.startswith("state.")}
    types = {"tensor(float)": "float32", "tensor(int64)": "int64"}
    state = {
        name: torch.zeros(each.shape).numpy().astype(types[each.type])
        for name, each in shapes.items()
    }
    voice = {
        f"enrolment.{name}.{layer}": each
        for name, stack in load_file(tmp_path / "me.safetensors").items()
        for layer, each in enumerate(stack)
    }
    names, got = [each.name for each in session.get_outputs()], []
    recording = noise(1, 40 * 32, seed=3)
    for chunk in recording.split(32, dim=1):
        found = session.run(names, {"chunk": chunk.numpy(), **state, **voice})
        named = dict(zip(names, found, strict=True))
        got.append(torch.from_numpy(named["enhanced"]))
        state = {name: named[name.replace("state.", "after.")] for name in state}
    # A hop behind.
    wanted = model.enhance(recording, told)
    torch.testing.assert_close(torch.cat(got[1:], dim=1), wanted[:, :-32], rtol=0, atol=1e-4)


def test_an_enhancer_of_the_hub_is_exported(run, refused, enhancer, pipeline, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    there = {"a-lab/an-enhancer": enhancer, "a-lab/a-pipeline": pipeline}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(there[name]))
    told = refused("export", "a-lab/a-pipeline", "-o", "x.onnx")
    assert told.startswith("a-lab/a-pipeline (PixArtSigmaPipeline) can't be exported; only the")
    result = run("export", "a-lab/an-enhancer", "-o", "step.onnx")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("step.onnx: 0.")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ["house:pixart", "-o", "x.onnx"],
            "house:pixart (PixArtSigmaPipeline) can't be exported; ",
        ),
        (["house:vae", "-o", "x.onnx"], "house:vae (AutoencoderKL) can't be exported; only"),
        (["house:clip", "-o", "x.onnx"], "house:clip (clip) can't be exported; only the streaming"),
        (["toy:dit", "-o", "x.onnx"], "toy:dit (random weights) can't be exported; only the"),
        (["a-lab/a-model", "-o", "x.onnx"], "a-lab/a-model can't be had: it isn't in this mach"),
        (["house:nobody", "-o", "x.onnx"], "there is no house model 'house:nobody'"),
        (["nowhere", "-o", "x.onnx"], "there is no model 'nowhere'"),
        (["toy:dit", "-o", "x.pt"], "x.pt isn't named .onnx; give the name of such a file."),
        (["toy:dit"], "missing option '-o' / '--output'"),
        (
            ["house:streaming-pse", "-o", "folder.onnx"],
            "folder.onnx is a folder; give the name of a file, e.g. enhancer.onnx.",
        ),
    ],
)
def test_refusals(refused, tmp_path, words, sentence):
    (tmp_path / "folder.onnx").mkdir()
    assert refused("export", *words).startswith(sentence)


def test_a_damaged_enhancer(refused, enhancer, tmp_path):
    (tmp_path / "cut").mkdir()
    for name in ("config.json", "model.safetensors"):
        content = (enhancer / name).read_bytes()
        (tmp_path / "cut" / name).write_bytes(content[: 500 if name[0] == "m" else None])
    assert "can't be opened as an enhancer" in refused("export", "cut", "-o", "x.onnx")


def test_without_the_packages(refused, enhancer, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    told = refused("export", enhancer, "-o", "x.onnx")
    assert "pip install 'pared[export]' brings it" in told
