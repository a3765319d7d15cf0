"""The bench of personalised enhancement at toy size: that it runs through, and repeats nothing."""

import importlib
import json
import sys

import pytest
import torch

from pared import results
from pared.speech.streaming_pse.method import StreamingPSE
from tests.docs.markdown import ROOT
from tests.speech import recognisers

soundfile = pytest.importorskip("soundfile")

AVERAGED = "cross, enrolment averaged"
TOY = [
    "model.config.width=16",
    "model.config.layers=1",
    "data.seconds=0.5",
    "data.mixing.enrolment_seconds=[0.5, 1.0]",
    *(f"stages.0.training.{x}" for x in ("steps=2", "batch_size=2", "warmup=1")),
]


@pytest.fixture
def bench(corpus, tmp_path, monkeypatch):
    """Runs the bench in toy size; everything is written under a temporary folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module, record = importlib.import_module("enhancement"), importlib.import_module("record")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    # Its first call compiles for a minute.
    monkeypatch.delitem(importlib.import_module("enhancement_marks").MEASURES, "DNSMOS")
    (tmp_path / "docs").mkdir()

    def run(*options):
        sets = [f"--set={change}" for change in (f"data.source={corpus}", *TOY)]
        toy = ["--folder", str(tmp_path / "runs"), "--print-steps=2", "--pairs=1"]
        monkeypatch.setattr(sys, "argv", ["enhancement.py", *toy, *sets, *options])
        module.main()
        return results.read("streaming-pse", tmp_path / "results")

    run.module = module
    return run


def test_what_is_trained_is_only_judged_anew(bench, tmp_path, monkeypatch, capsys, forbid_training):
    options = ["--parts", "learn", "--clips", "2", "--seeds", "0"]
    found = bench(*options, "--recogniser", "house:none")
    assert "house:none isn't shipped; words aren't counted" in capsys.readouterr().out
    (rows,) = found.tables.values()
    assert [row["enrolment"] for row in rows[2:]] == list(bench.module.ARMS)
    assert "WER of pairs" not in rows[2]
    keys = {claim.key for claim in found.claims}
    assert keys == {*bench.module.DIFFERENCES, "flips"}
    half, mean = (row["parameters"] for row in (rows[6], rows[3]))
    assert half <= mean / 2

    forbid_training()
    recognisers.conformer().save(tmp_path / "recogniser")
    found = bench(*options, "--kept", "--recogniser", str(tmp_path / "recogniser"))
    (again,) = found.tables.values()
    assert all(row["WER of pairs"] >= 0 for row in again)
    # Of the same weights, whatever they are judged by.
    assert [row.get("SI-SDRi, dB") for row in again] == [row.get("SI-SDRi, dB") for row in rows]
    folders = [path for path in (tmp_path / "runs").iterdir() if path.name[0] != "v"]
    assert len(folders) == 5
    for folder in folders:
        # Attention is judged once more, its enrolment averaged.
        kinds = 2 if folder.name.startswith("cross-0") else 1
        assert len(list(folder.glob("marks-*.json"))) == 2 * kinds
    # Nothing is heard anew either where nothing else is asked.
    monkeypatch.setattr(StreamingPSE, "build", None)
    monkeypatch.setattr(bench.module, "half_width", lambda _: 8)
    monkeypatch.setattr("enhancement_marks.Judge.bounds", lambda _: {})
    (rows,) = bench(*options, "--recogniser", str(tmp_path / "recogniser")).tables.values()
    assert rows == again[2:]


def test_only_some_arms_and_what_is_not_installed(bench, tmp_path, monkeypatch, capsys):
    marks = importlib.import_module("enhancement_marks")
    monkeypatch.setattr(marks, "MEASURES", {"PESQ": ("pared-never",), "DNSMOS": ("torch", "gone")})
    found = bench("--only", "none", "--seeds", "3", "--clips", "2", "--recogniser", "house:none")
    told = capsys.readouterr().out
    assert "pared-never isn't installed; PESQ isn't measured" in told
    assert "gone isn't installed; DNSMOS isn't measured" in told
    assert found is None, "results of some arms were written"
    (path,) = (tmp_path / "runs").glob("none-3-*/marks-*.json")
    figures = json.loads(path.read_text())
    assert "PESQ" not in figures and figures["flips"] == 0


def test_an_averaged_enrolment_is_one_frame(bench):
    torch.manual_seed(0)
    model = StreamingPSE(width=16, heads=2, layers=1, left_context=5).build()
    noisy, enrolment = torch.randn(1, 4000), torch.randn(8000)
    told = [bench.module.Bench.told(None, arm, model, enrolment) for arm in ("cross", AVERAGED)]
    whole, frame = (each["key"].shape[-2] for each in told)
    assert (whole > 20, frame) == (True, 1)
    first, second = (model.enhance(noisy, each) for each in told)
    assert not torch.allclose(first, second)
    # Where all frames of an enrolment say the same, nothing is lost.
    alike = model.cached(torch.randn(1, 1, 16).expand(1, 7, 16))
    one = {name: tensor[..., :1, :] for name, tensor in alike.items()}
    torch.testing.assert_close(model.enhance(noisy, alike), model.enhance(noisy, one))


def test_different_marks_make_no_row(bench):
    first, second = {"flips": 1.0, "machine": "a"}, {"flips": 0.5, "machine": "b"}
    row = bench.module.row_of("cross", [first, second])
    assert (row["flips"], row["machine"], row["seeds"]) == (0.75, "a; b", 2)
    with pytest.raises(ValueError, match="can't be one row"):
        bench.module.row_of("cross", [first, second | {"PESQ": 2.0}])


def test_claims_are_paired_by_seed(bench):
    def figures(gain):
        return {"SI-SDRi, dB": gain, "flips": 0.95, "parameters": 1e6, "machine": "this"}

    done = {
        "cross": {0: figures(3.0), 2: figures(5.0)},
        "static_mean": {0: figures(2.0), 1: figures(9.0), 2: figures(3.0)},
        "static_vector": {0: figures(1.0)},
        bench.module.HALF: {0: figures(0.5)},
        AVERAGED: {0: figures(2.0), 2: figures(4.5)},
    }
    claims = {claim.key: claim for claim in bench.module.claims_of(done, "some steps")}
    assert (claims["cross-over-static"].ours, claims["cross-over-static"].seeds) == (1.5, (0, 2))
    assert claims["cross-over-static"].spread == pytest.approx(2**-0.5, abs=1e-4)
    assert claims["half-size-over-static"].ours == -1.5
    assert "attention gives 0.75 dB less" in claims["cross-over-static"].note
    vector = claims["half-size-over-vector"]
    assert vector.ours == -0.5 and not vector.holds and vector.spread is None
    assert claims["flips"].holds and claims["flips"].seeds == (0, 2)


def saved(folder):
    torch.manual_seed(0)
    StreamingPSE(width=16, heads=2, layers=1, left_context=5).build().save_pretrained(folder)
    return str(folder)


def test_the_example_is_written(bench, tmp_path):
    from PIL import Image

    bench("--parts", "example", "--model", saved(tmp_path / "model"))
    names = ("enrolment", "mixture", "enhanced", "swapped")
    sounds = {name: soundfile.read(tmp_path / "docs" / f"speech-{name}.mp3") for name in names}
    assert {rate for _, rate in sounds.values()} == {16000}
    assert len({len(sound) for name, (sound, _) in sounds.items() if name != "enrolment"}) == 1
    with Image.open(tmp_path / "docs" / "speech-spectrograms.png") as picture:
        assert picture.width > 100 and picture.height > 5 * 100


@pytest.mark.slow
def test_streams_are_timed(bench, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    short = ["--minutes", "0.02", "--hold", "0.02"]
    found = bench("--parts", "stream", "--model", saved(tmp_path / "model"), *short)
    (rows,) = found.tables.values()
    assert [row["runtime"] for row in rows] == 2 * ["torch", "onnxruntime"]
    assert all(row["real-time factor"] > 0 for row in rows)
    assert [claim.key for claim in found.claims] == ["real-time-factor"]
