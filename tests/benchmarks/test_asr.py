"""The bench of attentions for recognition at toy size: it runs through, and compares like alike."""

import argparse
import importlib
import sys
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch

from pared import anatomy, results
from pared.bench.words import word_errors
from pared.errors import InputError
from pared.speech.hearing import FrameConvolution
from pared.speech.summary_mixing import Sinusoids
from tests.docs.markdown import ROOT
from tests.worlds.tones import Tones

pytest.importorskip("soundfile")
pytest.importorskip("jiwer")

TOY = [
    "data.utterances={}",
    *(f"model.config.{x}" for x in ("conv_dim=[16,16,16]", "hidden_size=32")),
    *(f"model.config.{x}" for x in ("intermediate_size=32", "num_hidden_layers=1")),
    *(f"stages.0.training.{x}" for x in ("steps=2", "batch_size=4", "warmup=1")),
]


@pytest.fixture
def bench(corpus, in_this_process, tmp_path, monkeypatch):
    """Runs the bench in toy size; everything is written under a temporary folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module, record = importlib.import_module("asr"), importlib.import_module("record")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    sets = [f"--set={change}" for change in (f"data.source={corpus}", *TOY)]
    toy = ["--folder", str(tmp_path / "runs"), "--seeds", "0", "--rounds", "1", "--batch", "2"]

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["asr.py", *toy, *sets, "--seconds", "0.5", *options])
        module.main()
        return results.read("asr", tmp_path / "results")

    run.module, run.toy = module, argparse.Namespace(
        recipe=module.RECIPE, set=[change.removeprefix("--set=") for change in sets]
    )  # fmt: skip
    return run


def test_it_runs_through_and_trains_nothing_again(bench, tmp_path, forbid_training):
    arms = list(bench.module.ARMS)
    assert bench("--only", *arms) is None, "results were written"
    forbid_training()
    found = bench("--lengths", "1", "2", "--floor", "1")
    starts = ("word errors", "a training step as", "a training step on 2 x", "seconds", "MiB")
    rows, short, long, seconds, mib = (
        next(table for name, table in found.tables.items() if name.startswith(start))
        for start in starts
    )
    assert [row["attention"] for row in rows] == arms
    for table in (short, long, seconds, mib):
        assert [row["attention"] for row in table] == list(bench.module.TIMED)
    assert rows[0]["parameters"] > rows[1]["parameters"] > 0
    assert "95 % of the seed 0, 4 voices resampled, noisy" in rows[0]
    # Three steps of four tones are an epoch of the twelve.
    for row in short:
        assert (row["utterances"], row["steps of an epoch"]) == ("4 x 1.2 s", 3)
        assert row["s per epoch"] == pytest.approx(3 * row["s per step"], rel=0.01)
    columns = ["attention", "exponent, 1 to 2 s", "1 s", "2 s"]
    assert all(list(row) == columns for row in mib)
    assert all(list(row) == [*columns, "cores busy elsewhere, at most", "note"] for row in seconds)
    assert set(found.figures) == {"time of an utterance", "memory of an utterance"}
    claims = [
        claim.key
        for slug in ("rope-asr", "summarymixing-asr")
        for claim in results.read(slug, tmp_path / "results").claims
    ]
    assert claims == [
        "errors-over-relative", "training-time", "parameters",
        "errors-over-attention", "training-time", "training-memory",
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_timed_step_is_one_of_the_recipe(bench, monkeypatch, precision):
    asr, toy, seen = bench.module, bench.toy, []
    toy.set += [f"stages.0.training.{x}" for x in (f"precision={precision}", "clip=1e-12")]
    own = asr.CTC.forward

    def forward(self, *given):
        seen.append(torch.is_autocast_enabled("cpu"))
        return own(self, *given)

    monkeypatch.setattr(asr.CTC, "forward", forward)
    step = asr.step_of(toy, asr.ROPE, asr.Size(2, 0.5))
    norms = []
    monkeypatch.setattr(
        step.optimizer,
        "step",
        lambda: norms.extend(p.grad.norm() for p in step.trained if p.grad is not None),
    )
    step()
    assert seen == [precision == "bf16"]
    assert 0 < torch.stack(norms).norm() < 1.01e-12
    trainable = asr.planned(toy, asr.ROPE, 0).stages[0].training.trainable
    names = [name for name, p in step.model.named_parameters() if p.requires_grad]
    assert names and all(any(fnmatch(n, pattern) for pattern in trainable) for n in names)


def test_parts_that_were_measured_apart_say_each_how(bench, monkeypatch):
    record = importlib.import_module("record")
    monkeypatch.setattr(record, "commit", lambda: "first")
    bench("--parts", "errors")
    monkeypatch.setattr(record, "commit", lambda: "second")
    tables = bench("--parts", "steps").tables
    told = {
        what: {row["what"]: row["value"] for row in tables[f"conditions of {what}"]}
        for what in ("word errors", "training steps")
    }
    assert [each["commit"] for each in told.values()] == ["first", "second"]
    assert told["training steps"]["precision"] == "bf16"
    assert told["word errors"]["command"].endswith("--parts errors")


def test_intervals_are_of_all_seeds_and_resample_voices(bench, tmp_path):
    asr, toy = bench.module, bench.toy
    toy.seeds, toy.gigabytes = [3, 5, 6, 7], 1
    said = ["one two", "three four", "five six", "seven eight"]
    # As many errors in what each voice says, so that drawing voices anew changes nothing.
    wrong = word_errors(said, ["one", said[1], "five", said[3]])
    first, last = (dict.fromkeys(("noisy", "clean"), w) for w in (wrong, word_errors(said, said)))
    found = {
        asr.BASE: [first, last, last, last],
        asr.ROPE: [last, last, last, first],
        asr.MEAN: [first, first, first, last],
    }
    asr.write_errors(found, ["a", "a", "b", "b"], toy)
    base, rope, mean = results.read("asr", tmp_path / "results").tables["word errors"]
    of = "mean of seeds 3 5 6 7"
    assert base[f"WER, {of}, noisy"] == 0.0625
    assert base["each seed, noisy"] == "0.2500 0.0000 0.0000 0.0000"
    assert base[f"95 % of the {of}, 2 voices resampled, clean"] == "0.0625 to 0.0625"
    against = f"95 % of the {of} minus the base's, 2 voices resampled, noisy"
    assert against not in base
    # The seeds' differences go both ways, and their mean is none.
    assert rope[against] == "+0.0000 to +0.0000" and mean[against] == "+0.1250 to +0.1250"


def test_claims_are_ratios_of_errors_in_noise_paired_by_seed(bench, tmp_path):
    asr, toy = bench.module, bench.toy
    toy.seeds, toy.gigabytes = [3, 5], 1
    said = ["one two three four", "five six seven eight"]

    def missed(*counts):
        return [word_errors(said, [said[0], " ".join(said[1].split()[n:])]) for n in counts]

    def runs(noisy, clean):
        both = zip(missed(*noisy), missed(*clean), strict=True)
        return [{"noisy": one, "clean": other} for one, other in both]

    found = {
        asr.BASE: runs((4, 2), (1, 1)),
        asr.ROPE: runs((2, 2), (3, 3)),
        asr.MEAN: runs((3, 3), (1, 1)),
    }
    asr.write_errors(found, ["a", "b"], toy)
    claims = [results.read(arm, tmp_path / "results").claims for arm in (asr.ROPE, asr.MEAN)]
    (rope,), (mean,) = claims
    assert (rope.key, rope.ours, rope.holds) == ("errors-over-relative", 0.75, True)
    assert (mean.key, mean.ours, mean.holds) == ("errors-over-attention", 1.125, False)
    assert rope.spread == pytest.approx(0.5**1.5, abs=1e-4)
    assert rope.seeds == mean.seeds == (3, 5)
    assert [claim.note.endswith("Without the paper's sinusoids.") for claim in (rope, mean)] == [
        False,
        True,
    ]


def test_what_is_judged_is_held_out_in_noise_and_without(bench, tmp_path, monkeypatch):
    asr, toy = bench.module, bench.toy
    toy.seeds, toy.only, toy.utterances, toy.folder = [0], None, None, tmp_path
    longer = [len(Tones(seconds=0.9).waveform(n)) for n in range(12)]
    said = asr.heldout(toy)
    assert said.lengths == longer
    written = []
    monkeypatch.setattr(asr.training, "run", lambda *_: "trained")
    monkeypatch.setattr(
        asr, "errors_of", lambda _, texts, heard: SimpleNamespace(rate=0, texts=texts, heard=heard)
    )
    monkeypatch.setattr(asr, "write_errors", lambda *given: written.append(given))
    asr.errors(toy)
    ((found, voices, _),) = written
    assert list(found) == list(asr.ARMS) and voices == said.speakers
    snr = asr.planned(toy, asr.BASE, 0).data.snr
    assert snr is not None
    for (run,) in found.values():
        for what, noise in (("noisy", snr), ("clean", None)):
            assert run[what].texts == said.transcripts
            wanted = asr.sounds_of(said, noise)
            assert all(map(torch.equal, run[what].heard, wanted))
    assert not torch.equal(*(run[what].heard[0] for what in ("noisy", "clean")))


def test_claims_of_costs_are_what_the_base_takes_over_ours(bench, take, tmp_path, monkeypatch):
    asr = bench.module
    monkeypatch.setattr(asr, "step_of", lambda *_: None)
    seconds = {asr.BASE: 3.0, asr.ROPE: 2.0, asr.MEAN: 1.0}
    take(asr, seconds, {asr.BASE: 5 * 2**20, asr.ROPE: 4 * 2**20, asr.MEAN: 2 * 2**20})
    tables = bench("--parts", "steps").tables
    (long,) = (table for name, table in tables.items() if name.startswith("a training step on"))
    assert [row["base / this, MiB"] for row in long] == [1, 1.25, 2.5]
    assert [row["base / this, s"] for row in long] == [1, 1.5, 3]
    claims = [
        (slug, claim.key, claim.ours)
        for slug in (asr.ROPE, asr.MEAN)
        for claim in results.read(slug, tmp_path / "results").claims
    ]
    spared = asr.spared_parameters() / 1e6
    assert claims == [
        (asr.ROPE, "training-time", 1.5),
        (asr.ROPE, "parameters", pytest.approx(spared, abs=1e-4)),
        (asr.MEAN, "training-time", 3.0),
        (asr.MEAN, "training-memory", 2.5),
    ]
    assert spared > 0


@pytest.mark.parametrize(
    "speakers, told", [("aa", "is said by one voice"), (["a", None], "lacks names of speakers")]
)
def test_voices_to_judge_by_are_asked_for_before_training(bench, monkeypatch, speakers, told):
    asr, toy = bench.module, bench.toy
    toy.utterances = None
    said = SimpleNamespace(speakers=speakers)
    monkeypatch.setattr(asr, "utterances", lambda *_: said)
    with pytest.raises(InputError, match=told):
        asr.errors(toy)


def test_another_recipe_is_another_training(bench, tmp_path):
    for options in ([], ["--set", "model.config.hidden_dropout=0.2"], []):
        bench("--only", "relative", *options)
    assert len(list((tmp_path / "runs").glob("relative-0-*"))) == 2


def test_arms_differ_in_their_attention_alone(bench):
    asr, toy = bench.module, bench.toy
    toy.set.append("model.config.attention_dropout=0.25")
    for arm in asr.ARMS:
        family = anatomy.of(asr.fresh(toy, arm).model)
        (conv,) = (site.module.depthwise_conv for site in family.sites("convolution"))
        assert isinstance(conv, FrameConvolution)
        layer = family.sites("self_attention")[0].module
        mixer = "mixer.c.dropout"
        dropouts = {asr.BASE: "dropout.p", asr.ROPE: "dropout", asr.MEAN: mixer, asr.PLACED: mixer}
        for name in dropouts[arm].split("."):
            layer = getattr(layer, name)
        assert layer == 0.25
        placed = any(isinstance(module, Sinusoids) for module in family.model.modules())
        assert placed == (arm == asr.PLACED)
    # A padded batch gives what its utterances give alone.
    recogniser = asr.fresh(toy, asr.BASE)
    model, sounds = recogniser.model.eval(), [torch.randn(16000), torch.randn(9600)]
    both, alone = recogniser.inputs(sounds), recogniser.inputs(sounds[1:])
    with torch.no_grad():
        logits, wanted = (
            model(**{k: batch[k] for k in ("input_values", "attention_mask")}).logits
            for batch in (both, alone)
        )
    torch.testing.assert_close(logits[1:, : wanted.shape[1]], wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_process_of_its_own_takes_no_more_than_it_may(corpus, costs):
    asr = importlib.import_module("asr")
    sets = [f"data.source={corpus}", *TOY]
    options = argparse.Namespace(recipe=asr.RECIPE, set=sets)
    # 4 heads x 6000 x 11999 scores alone take more than a gibibyte.
    assert costs.alone(asr.heard_at, options, asr.BASE, 120.0, gigabytes=1) is None
    found = costs.alone(asr.heard_at, options, asr.MEAN, 120.0, gigabytes=1)
    assert found["length"] == 120 and found["MiB"] < 1024
