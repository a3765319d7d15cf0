"""The bench of pre-training from recordings at toy size: it runs through, and compares alike."""

import argparse
import importlib
import json
import sys

import pytest
import torch

from pared import anatomy, results
from pared.speech.hearing import FrameConvolution
from pared.speech.summary_mixing import Sinusoids
from pared.worlds.speech import grammar
from tests.docs.markdown import ROOT

pytest.importorskip("jiwer")

TOY = [
    *(f"model.config.{x}" for x in ("hidden_size=32", "intermediate_size=32")),
    *(f"model.config.{x}" for x in ("num_hidden_layers=1", "conv_dim=[20,16,16]")),
    "model.config.num_conv_pos_embedding_groups=32",
    "model.config.num_codevectors_per_group=16",
    *(f"stages.0.training.{x}" for x in ("steps=2", "batch_size=4", "warmup=1")),
    "data.seconds=0.7",
]


@pytest.fixture
def of(monkeypatch):
    """A module of `benchmarks/`, by the end of its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda end="": importlib.import_module(f"speech_pretraining{end}")


@pytest.fixture
def toy(of):
    """What the arms are built by."""
    return argparse.Namespace(recipe=of("_arms").RECIPES / "probed.toml", set=TOY)


@pytest.fixture
def bench(of, spoken, in_this_process, tmp_path, monkeypatch):
    """Runs the bench in toy size; everything is written under a temporary folder."""
    module, record = of(), importlib.import_module("record")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for name, task in module.TASKS.items():
        monkeypatch.setitem(module.TASKS, name, task._replace(epochs=1))
    small = ["--folder", str(tmp_path / "runs"), "--seeds", "0", "--utterances", "6", "2", "3"]

    def run(*options):
        sets = [f"--set={change}" for change in TOY]
        monkeypatch.setattr(sys, "argv", ["speech_pretraining.py", *small, *sets, *options])
        module.main()
        return results.read(module.SLUG, tmp_path / "results")

    return run


def test_it_runs_through_and_trains_nothing_again(bench, of, spoken, forbid_training):
    module = of()
    assert bench("--only", *module.ARMS) is None, "results of some arms were written"
    # Frames are told apart, too, where training hasn't been; commands are probed on others.
    assert ("commands", "validation") in spoken.asked
    forbid_training()
    rows = bench("--kept").tables["frozen probes"]
    assert [row["encoder"] for row in rows] == list(module.ARMS)
    found = bench("--parts", "probes")
    rows = found.tables["frozen probes"]
    assert [row["encoder"] for row in rows] == list(module.ROWS.values())
    for row in rows:
        about = {name: row[task.about] for name, task in module.TASKS.items()}
        assert about["words"] >= 0 and 0 <= about["voices"] <= 1 and 0 <= about["intents"] <= 1
    assert all(row["codes in use"] > 0 for row in rows[:4])
    assert all(row["codes in use"] == "-" for row in rows[4:])
    assert [claim.key for claim in found.claims] == list(module.PROBED.values())
    assert "LSTM probe" in found.claims[0].note and "linear probe" in found.claims[1].note


def test_costs_of_all_arms(bench, of):
    short = ["--sounds", "2", "--seconds", "0.5", "--rounds", "1"]
    found = bench("--parts", "steps", "lengths", *short, "--lengths", "1", "2", "--floor", "1")
    table, seconds, mib = found.tables.values()
    for rows in (table, seconds, mib):
        assert [row["attention"] for row in rows] == list(of().ARMS)
    columns = ["attention", "exponent, 1 to 2 s", "1 s", "2 s"]
    assert all(list(row) == columns for row in mib)
    assert all(list(row) == [*columns, "cores busy elsewhere, at most", "note"] for row in seconds)
    assert set(found.figures) == {"time of a step", "memory of a step"}
    keys = [claim.key for claim in found.claims]
    assert keys == ["pretraining-time", "pretraining-memory", "parameters"]
    assert "attention by sdpa" in found.claims[0].note and found.claims[2].holds


def test_claims_of_costs_are_what_the_twin_takes_over_ours(bench, of, take, monkeypatch):
    module, pretraining = of("_costs"), of()
    seconds = dict.fromkeys(pretraining.ARMS, 9.0) | {module.BASE: 3.0, module.OURS: 2.0}
    memory = dict.fromkeys(pretraining.ARMS, 9 * 2**20)
    memory |= {module.BASE: 5 * 2**20, module.OURS: 2 * 2**20}
    take(module, seconds, memory)
    monkeypatch.setattr(module, "paper_parameters", lambda: 7_000_000)
    found = bench("--parts", "steps", "--sounds", "1", "--seconds", "0.5", "--rounds", "1")
    claims = [(claim.key, claim.ours) for claim in found.claims]
    assert claims == [("pretraining-time", 1.5), ("pretraining-memory", 2.5), ("parameters", 7.0)]


def test_arms_differ_in_their_attention_alone(of, toy):
    arms = of("_arms")
    toy.set = [*TOY, "model.config.attention_dropout=0.25"]
    models = {arm: arms.fresh(toy, arm) for arm in arms.ARMS}
    dropouts = {arms.ROPE: "dropout", arms.OURS: "mixer.c.dropout"}
    for arm, model in models.items():
        family = anatomy.of(model)
        (conv,) = (site.module.depthwise_conv for site in family.sites("convolution"))
        assert isinstance(conv, FrameConvolution)
        layer = family.sites("self_attention")[0].module
        for name in dropouts.get(arm, "dropout.p").split("."):
            layer = getattr(layer, name)
        assert layer == 0.25
        # Positions are added once in the twin as in ours, and relative ones are in no other.
        added = [module for module in model.modules() if isinstance(module, Sinusoids)]
        assert len(added) == (arm in (arms.BASE, arms.OURS))
        relative = any("pos_bias_u" in name for name, _ in model.named_parameters())
        assert relative == (arm == arms.RELATIVE)
    # The twin tells frames apart that sound alike, far from the ends that convolutions hear.
    encoder = models[arms.BASE].eval().get_submodule(anatomy.of(models[arms.BASE]).encoder)
    frames = encoder(torch.ones(1, 60, 32)).last_hidden_state[0]
    assert (frames[29] - frames[30]).abs().max() > 1e-3


def test_claims_are_paired_by_seed(of):
    module = of()

    def figures(words, voices, intents):
        return {"words": words, "voices": voices, "intents": intents}

    found = {
        module.OURS: {0: figures(0.1, 0.9, 0.8), 2: figures(0.3, 0.5, 0.8), 3: figures(9, 9, 9)},
        module.BASE: {0: figures(0.2, 0.8, 0.9), 2: figures(0.2, 0.6, 0.7)},
    }
    options = argparse.Namespace(utterances=[400, 60, 300])
    claims = {claim.key: claim for claim in module.claims_of(found, options)}
    errors = claims["probe-errors"]
    assert (errors.ours, errors.seeds, errors.holds) == (1.0, (0, 2), True)
    assert errors.spread == pytest.approx(0.5**0.5, abs=1e-4)
    assert "0.200 against 0.200 on 300 utterances" in errors.note
    assert claims["probe-voices"].ours == 0 and claims["probe-intents"].ours == 0
    assert module.claims_of({module.OURS: {0: {}}}, options) == []


def test_probes_are_judged_on_what_they_have_not_learnt_from(of, spoken, monkeypatch):
    module = of("_probes")
    splits = {name: task.split for name, task in module.TASKS.items()}
    # Voices can be named only by who has met them, in texts that nobody has.
    assert splits == {"words": "heldout", "voices": "validation", "intents": "heldout"}
    fitted, judged = [], []

    def read(probe, examples, characters):
        judged.append(examples)
        return [characters.decode(target.tolist()) for target in examples.targets]

    def name(probe, examples):
        judged.append(examples)
        return 0.25

    monkeypatch.setattr(module.probing, "fit", lambda _, *given, **__: fitted.append(given))
    monkeypatch.setattr(module.probing, "transcripts", read)
    monkeypatch.setattr(module.probing, "accuracy", name)
    options = argparse.Namespace(utterances=[3, 2, 4])
    # Features that tell of which sound they are.
    found = module.probed(
        lambda sounds: [torch.full((2, 1, 3), float(len(sound))) for sound in sounds], options, 0
    )
    assert found == {"words": 0, "voices": 0.25, "intents": 0.25}
    for (task, about), (learnt, chosen, *_), asked in zip(
        module.TASKS.items(), fitted, judged, strict=True
    ):
        known, unknown = (spoken(about.kind, *part) for part in (("train", 5), (about.split, 4)))
        voices = sorted({*known.speakers, *unknown.speakers})
        for examples, world, part in (
            (learnt, known, slice(3)),
            (chosen, known, slice(3, 5)),
            (asked, unknown, slice(4)),
        ):
            assert [int(each[0, 0, 0]) for each in examples.features] == world.lengths[part]
            targets = module.targets_of(task, world, voices)[part]
            assert all(map(torch.equal, examples.targets, targets))
            assert len(examples.targets) == len(targets)


def test_intents_and_voices_are_asked_by_name(of, spoken):
    module, world = of("_probes"), spoken("commands", "train", 6)
    wanted = module.targets_of("intents", world, [])
    assert [grammar.COMMANDS[n] for n in wanted] == world.intents
    voices = sorted(set(world.speakers))
    assert [voices[n] for n in module.targets_of("voices", world, voices)] == world.speakers
    letters = module.targets_of("words", world, [])
    assert module.CHARACTERS.decode(letters[0].tolist()) == world.transcripts[0]


def test_what_was_asked_for_otherwise_is_not_taken_for_done(bench, tmp_path):
    """Weights are kept by what decides them, figures by what was asked of the probes, too."""
    more = ["--utterances", "5", "2", "3"]
    other = ["--set", "stages.0.training.steps=3"]
    runs = tmp_path / "runs"
    for options in ([], more, other):
        bench("--only", "log-mel", *options)
    files = list(runs.glob("log-mel-0-*.json"))
    assert len(files) == 3 and all(json.loads(file.read_text()) for file in files)
    options = ["--only", "summarymixing-asr"]
    bench(*options)
    (folder,) = (path for path in runs.glob("summarymixing-asr-0-*") if path.is_dir())
    bench(*options, *more)
    assert len(list(runs.glob(f"{folder.name}.*.json"))) == 2
    assert [path for path in runs.iterdir() if path.is_dir()] == [folder]
    bench(*options, *other)
    assert len([path for path in runs.iterdir() if path.is_dir()]) == 2
