"""The bench of reasons at toy size: what each variant changes, and what it says of a map."""

import argparse
import importlib

import pytest
import torch

from pared.speech.summary_mixing import FrameMixer
from tests.benchmarks.test_asr import TOY
from tests.docs.markdown import ROOT

pytest.importorskip("soundfile")
pytest.importorskip("jiwer")


@pytest.fixture
def reasons(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("asr_reasons")


def test_it_runs_through(reasons, corpus, trained_once):
    blocks = [*TOY, "model.config.num_hidden_layers=2"]
    sets = [f"--set={change}" for change in (f"data.source={corpus}", *blocks)]
    tables = trained_once(reasons, "summarymixing-asr", *sets)
    rows, maps, conditions = tables.values()
    assert [row["changed"] for row in rows] == [v.told for v in reasons.VARIANTS.values()]
    for row in rows:
        assert {"WER, noisy", "WER, clean"} < row.keys()
        assert 0 < row["CTC loss, last tenth of the steps"] < 1e3
    assert [row["block"] for row in maps] == [0, 1]
    assert {"what": "seed", "value": "0"} in conditions


def test_each_changes_one_thing(reasons):
    options = argparse.Namespace(recipe=reasons.asr.RECIPE, set=[], seed=3)
    plans = {name: reasons.planned(options, name) for name in reasons.VARIANTS}
    arms = {
        arm: reasons.asr.planned(options, arm, 3) for arm in (reasons.asr.BASE, reasons.asr.MEAN)
    }
    widths = {name: plan.model.config["conv_depthwise_kernel_size"] for name, plan in plans.items()}
    assert widths == dict.fromkeys(plans, 15) | {"wide-relative": 31, "wide-mean": 31}
    for name, plan in plans.items():
        arm = arms[reasons.VARIANTS[name].over]
        assert plan.stages == arm.stages and plan.model.seed == 3
        same_methods = plan.model.methods == arm.model.methods
        assert same_methods != (plan.model.config == arm.model.config)


def test_what_variants_mix_by(reasons):
    options = argparse.Namespace(recipe=reasons.asr.RECIPE, set=[], seed=0)

    def encoder(name):
        plan, training = reasons.planned(options, name), reasons.asr.training
        extractor = training.extractor_of(plan.data.extractor)
        found = training.started(plan.model, reasons.asr.built, extractor, training.Characters())
        return found.model.wav2vec2_conformer.encoder

    def mixers(name):
        found = [layer.self_attn for layer in encoder(name).layers]
        return [each.window if isinstance(each, FrameMixer) else "none" for each in found]

    assert mixers("early") == [None, None, "none", "none"]
    assert mixers("near") == [12] * 4
    assert mixers("wide-mean") == [None] * 4
    assert mixers("wide-relative") == mixers("unplaced") == ["none"] * 4
    placed = [name for name in reasons.VARIANTS if encoder(name).embed_positions is not None]
    assert placed == ["wide-relative", "early"]


def test_a_map_of_a_mean_is_one_of_a_mean(reasons):
    frames = 10
    same = torch.full((frames, frames), 1 / frames)
    own = torch.eye(frames)
    uniform, sharp = reasons.marks_of(torch.stack([same, own])).tolist()
    near = sum(min(t + 3, 9) - max(t - 3, 0) + 1 for t in range(frames)) / frames
    assert uniform == pytest.approx([1, 0, near / frames], abs=1e-6)
    assert sharp == pytest.approx([1 / frames, 0.9, 1], abs=1e-6)
    # All to one frame, the same for each: as sharp as can be, and no different from one another.
    one = torch.zeros(1, frames, frames)
    one[..., 4] = 1
    assert reasons.marks_of(one)[0].tolist() == pytest.approx([0.1, 0, 0.7], abs=1e-6)
