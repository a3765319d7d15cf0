"""The bench of reasons at toy size: what each variant changes, and what it says of an attention."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from pared.speech.streaming_pse.method import StreamingPSE
from tests.benchmarks.test_enhancement import TOY
from tests.docs.markdown import ROOT

pytest.importorskip("soundfile")


@pytest.fixture
def reasons(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("enhancement_reasons")


def test_it_runs_through(reasons, corpus, trained_once):
    sets = [f"--set={change}" for change in (f"data.source={corpus}", *TOY)]
    tables = trained_once(reasons, "streaming-pse", "--clips", "2", "--pairs", "1", *sets)
    rows, maps, conditions = tables.values()
    assert [row["changed"] for row in rows] == [v.told for v in reasons.VARIANTS.values()]
    for row in rows:
        gain = row["cross, SI-SDRi, dB"] - row["static_mean, SI-SDRi, dB"]
        assert row["attention over mean, dB"] == pytest.approx(gain, abs=2e-3)
        assert "lost where all frames are told the same, dB" in row
    assert [(row["changed"], row["layer"]) for row in maps] == [(r["changed"], 0) for r in rows]
    assert {"what": "seeds", "value": "0"} in conditions


def test_each_changes_one_thing(reasons):
    asked = {"recipe": reasons.enhancement.RECIPE, "set": [], "clips": 0, "pairs": 0}
    options = SimpleNamespace(**asked, folder=None)
    plans = {name: reasons.bench_of(options, name).plan for name in reasons.VARIANTS}
    same = plans["same"]
    assert {plan.stages[0].training.precision for plan in plans.values()} == {"no"}
    assert plans["longer"].stages[0].training.steps == 3 * same.stages[0].training.steps
    assert (plans["longer"].data, plans["longer"].model) == (same.data, same.model)
    assert plans["moods"].stages == same.stages
    assert plans["moods"].data.mixing.mood == (0.8, 1.25) and same.data.mixing.mood == (1, 1)
    assert plans["moods"].model.config == same.model.config | {"enrolment_seconds": 10.0}
    framed = plans["frames"]
    assert (framed.data, framed.stages) == (same.data, same.stages)
    assert framed.model.config == same.model.config | {"enrolment_encoder": "frames"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return StreamingPSE(width=16, heads=2, layers=2, left_context=5).build().eval()


@torch.no_grad()
def test_what_all_frames_are_told_alike_is_what_they_are_told_on_average(reasons, model):
    noisy, told = torch.randn(1, 4000), model.encode(torch.randn(1, 8000))
    given = []
    model.layers[1].fusion.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    model.enhance(noisy, told)
    with reasons.constant(model):
        model.enhance(noisy, told)
    model.enhance(noisy, told)
    own, alike, again = given
    assert torch.equal(own, again) and not torch.allclose(own[:, :1], own)
    # What the layer before was told differs, so this one's differs a little from its own mean.
    assert torch.equal(alike, alike[:, :1].expand_as(alike))
    with reasons.constant(model):
        first, second = (model.layers[0].cross(x, *keys_of(told)) for x in frames())
    plain = [model.layers[0].cross(x, *keys_of(told)).mean(dim=1) for x in frames()]
    torch.testing.assert_close(torch.stack([first[:, 0], second[:, 3]]), torch.stack(plain))


def keys_of(told):
    return told["key"][0], told["value"][0], told["valid"]


def frames():
    return torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_maps_are_those_that_the_model_attends_by(reasons, model, monkeypatch):
    """Pauses aren't counted: transformers' own eager attention says what is attended to."""
    enrolment = torch.cat([torch.randn(4000), torch.zeros(4000), torch.randn(4000)])
    clip = SimpleNamespace(mixture=torch.randn(3000), enrolment=enrolment)
    seen = []
    monkeypatch.setattr(
        reasons, "unlike_a_mean", lambda maps: (seen.append(maps), torch.zeros(2, 2))[1]
    )
    reasons.maps_of(model, [clip])
    told = model.encode(enrolment[None])
    valid = told["valid"][0]
    assert 0 < valid.sum() < len(valid)
    told_values = told["value"][0, 0][:, valid]
    wanted = []
    model.layers[0].cross.to_out.register_forward_pre_hook(lambda module, x: wanted.append(x[0]))
    model.enhance(clip.mixture[None], told)
    ours = (seen[0] @ told_values).transpose(0, 1).flatten(1)
    torch.testing.assert_close(ours, wanted[0][0], rtol=1e-4, atol=1e-5)


def test_a_mean_and_a_choice(reasons):
    keys = 10
    mean = torch.full((6, keys), 1 / keys)
    one = torch.zeros(6, keys)
    one[:, 3] = 1
    other = torch.eye(keys)[:6]
    uniform, same, each = reasons.unlike_a_mean(torch.stack([mean, one, other])).tolist()
    assert uniform == pytest.approx([1, 0], abs=1e-6)
    assert same == pytest.approx([0.1, 0], abs=1e-6)
    assert each == pytest.approx([0.1, 5 / 6], abs=1e-6)
