"""The bench of personalised enhancement at toy size: that it runs through, and repeats nothing."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from pared import recipe, results
from pared.speech.streaming_pse.method import StreamingPSE
from pared.speech.streaming_pse.training import data_of
from tests.docs.markdown import ROOT
from tests.speech import recognisers
from tests.worlds.tones import RATE, Tones

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

    def plan(*changes):
        return recipe.read(module.RECIPE, [f"data.source={corpus}", *TOY, *changes])

    run.module, run.plan = module, plan
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
    told = [bench.module.Bench.told(None, arm, 0, model, enrolment) for arm in ("cross", AVERAGED)]
    whole, frame = (each["key"].shape[-2] for each in told)
    assert (whole > 20, frame) == (True, 1)
    first, second = (model.enhance(noisy, each) for each in told)
    assert not torch.allclose(first, second)
    # Where all frames of an enrolment say the same, nothing is lost.
    alike = model.cached(torch.randn(1, 1, 16).expand(1, 7, 16))
    one = {name: tensor[..., :1, :] for name, tensor in alike.items()}
    torch.testing.assert_close(model.enhance(noisy, alike), model.enhance(noisy, one))


def test_what_is_judged_and_timed_is_held_out(bench, monkeypatch):
    sets, stream = map(importlib.import_module, ("enhancement_sets", "enhancement_stream"))
    plan, taken = bench.plan(), []

    def taking(table, split=None):
        data = data_of(table, split)
        taken.append(data.speech.lengths)
        return data

    for module in (sets, stream, bench.module):
        monkeypatch.setattr(module, "data_of", taking)
    sets.clips(plan, 1)
    sets.pairs(plan, 1)
    stream.minute(plan)
    bench.module.Bench.data.func(SimpleNamespace(plan=plan))
    heldout, known = (
        [len(tones.waveform(n)) for n in range(12)] for tones in (Tones(seconds=0.9), Tones())
    )
    assert taken == [heldout, heldout, heldout, known]


def test_a_pair_is_two_talkers_alike_and_other_recordings_of_them(bench):
    sets, tones = importlib.import_module("enhancement_sets"), Tones(seconds=0.9)
    frequencies = torch.tensor([float(tones.frequency(n)) for n in range(12)])

    def said(sound):
        peak = torch.fft.rfft(sound, 4 * RATE).abs().argmax() / 4
        return int((frequencies - peak).abs().argmin())

    for pair in sets.pairs(bench.plan("data.mixing.enrolment_noise=0"), 6):
        torch.testing.assert_close(pair.mixture, pair.target + pair.other, rtol=0, atol=1e-6)
        torch.testing.assert_close(sets.rms(pair.target), sets.rms(pair.other))
        target, mine, other, theirs = map(said, (pair.target, pair.mine, pair.other, pair.theirs))
        assert target // 3 == mine // 3 != other // 3 == theirs // 3
        assert target != mine and other != theirs
        assert len(pair.target) == len(tones.waveform(target)), "the sentence isn't whole"


def test_marks_are_best_for_the_target(bench, monkeypatch):
    marks = importlib.import_module("enhancement_marks")
    monkeypatch.setattr(marks, "MEASURES", {})
    plan = bench.plan("data.mixing.absent=0.4")
    judge = marks.Judge(plan, 6, 2, "house:none")
    assert {one.present for one in judge.clips} == {True, False}
    found = judge.of_clips([one.target for one in judge.clips])
    assert found["SI-SDRi, dB"] > 20 and found["frames suppressed"] == 0
    assert found["left without target, dB"] < -60
    found = judge.of_clips([one.mixture for one in judge.clips])
    assert found["SI-SDRi, dB"] == 0 and found["left without target, dB"] == 0
    found = judge.of_clips([0.01 * one.mixture for one in judge.clips])
    assert found["frames suppressed"] == 1
    wanted = {id(pair.mine): pair.target for pair in judge.pairs}
    wanted |= {id(pair.theirs): pair.other for pair in judge.pairs}
    found = judge.of_pairs(lambda _, enrolment: wanted[id(enrolment)])
    assert found["SI-SDRi of pairs, dB"] > 20 and found["flips"] == 1
    # The other of both for either.
    found = judge.of_pairs(lambda noisy, enrolment: noisy - wanted[id(enrolment)])
    assert found["SI-SDRi of pairs, dB"] < -20 and found["flips"] == 0


def test_the_other_encoder_learns_to_tell_voices_apart(bench, tmp_path):
    """Or what is told an embedding would be told nothing."""
    voiceprint = importlib.import_module("voiceprint")
    data = data_of(bench.plan("data.mixing.pitch=[1.0, 1.0]").data)
    learnt = voiceprint.learnt(data, tmp_path / "print", 30, seed=0)
    assert len(data.mixer.talkers) == 4 and not learnt.training
    # Which of the four pitches it was, no one can tell here.
    batch = voiceprint.Voices(data).batch(torch.arange(40) % len(data), torch.Generator())
    voices = learnt.classes(learnt(batch["sounds"])).argmax(dim=1) // voiceprint.PITCHES
    assert (voices == batch["voices"] // voiceprint.PITCHES).float().mean() > 0.9
    assert 0 <= voiceprint.named(learnt, data, 40) < 0.6


def test_embeddings_are_of_what_is_not_padding(bench):
    voiceprint = importlib.import_module("voiceprint")
    data, learnt = data_of(bench.plan().data), voiceprint.VoicePrint(4).eval()
    drawn = data.batch(torch.arange(3), torch.Generator().manual_seed(0))
    found = voiceprint.Embedded(data, learnt).batch(
        torch.arange(3), torch.Generator().manual_seed(0)
    )
    assert "enrolment_samples" not in found and found["enrolment"].shape == (3, voiceprint.WIDTH)
    for row, sound, end in zip(
        found["enrolment"], drawn["enrolment"], drawn["enrolment_samples"], strict=True
    ):
        assert torch.equal(row, learnt(sound[None, :end])[0])


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
        "static_vector": {0: figures(1.0) | {bench.module.NAMED: 0.725}},
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
    assert "and names 72 percent of the voices of the training, raised and low" in vector.note
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
