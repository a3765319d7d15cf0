"""The bench of the house models of speech, of toys in their place: what they hear is held out."""

import importlib
import sys

import pytest
import torch

from pared import results
from pared.speech.streaming_pse.method import StreamingPSE
from tests.docs.markdown import ROOT
from tests.speech import recognisers

pytest.importorskip("jiwer")


@pytest.fixture
def bench(spoken, tmp_path, monkeypatch):
    """Runs the bench on toys; everything is written under a temporary folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module, record, marks = (
        importlib.import_module(name) for name in ("house_speech", "record", "enhancement_marks")
    )
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(marks, "MEASURES", {})
    recognisers.conformer().save(tmp_path / "recogniser")
    torch.manual_seed(0)
    model = StreamingPSE(width=16, heads=2, layers=1, left_context=5).build()
    model.save_pretrained(tmp_path / "enhancer")
    monkeypatch.setattr(module, "RECOGNISER", str(tmp_path / "recogniser"))
    monkeypatch.setattr(module, "ENHANCER", str(tmp_path / "enhancer"))

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["house_speech.py", "--utterances", "4", *options])
        module.main()
        return results.read("house", tmp_path / "results").tables

    run.module = module
    return run


def test_the_recogniser_hears_unknown_voices_with_noise_and_without(bench, spoken, monkeypatch):
    module, heard = bench.module, []
    sounds_of = module.sounds_of
    monkeypatch.setattr(
        module, "sounds_of", lambda said, snr: heard.append(snr) or sounds_of(said, snr)
    )
    tables = bench("--parts", "recogniser")
    assert set(tables) == {"The recogniser", "Conditions of speech"}
    rows = tables["The recogniser"]
    assert [(row["said"], row["heard"]) for row in rows] == [
        (kind, name) for kind in module.KINDS for name in module.SOUNDS
    ]
    assert heard == 3 * [None, (15.0, 15.0), (5.0, 5.0)]
    assert spoken.asked == {(kind, "heldout") for kind in module.KINDS}
    for row in rows:
        low, high = map(float, row["95 %, voices resampled"].split(" to "))
        assert row["utterances"] == 4 and 0 < low <= row["WER"] <= high


def test_the_enhancer_is_judged_beside_nothing_done_on_unknown_voices(bench, spoken):
    tables = bench("--parts", "enhancer", "--clips", "3", "--pairs", "1")
    assert spoken.asked == {("sentences", "heldout")}
    nothing, ours = tables["The enhancer"]
    assert (nothing["sound"], ours["sound"]) == ("unprocessed", bench.module.ENHANCER)
    assert nothing["SI-SDRi, dB"] == nothing["SI-SDRi of pairs, dB"] == nothing["flips"] == 0
    # Of a toy whose weights are random.
    assert ours["SI-SDRi, dB"] != 0 and ours.keys() == nothing.keys() >= {"WER of pairs"}
    (judged,) = (r["value"] for r in tables["Conditions of speech"] if r["what"] == "judged")
    assert judged == "3 mixtures as in training, 1 pairs of talkers"
