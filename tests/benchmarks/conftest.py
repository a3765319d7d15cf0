"""What tests of speech benches share: voices to learn from, and no second process or training."""

import importlib
import sys

import pytest
import torch

from pared import results
from pared.bench import timing
from pared.training import loop
from pared.worlds import speech
from pared.worlds.speech import grammar
from tests.docs.markdown import ROOT
from tests.worlds.tones import Tones, write_librispeech


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Four talkers of three tones each, once to learn from and once, longer, to be judged by."""
    place = tmp_path_factory.mktemp("voices")
    write_librispeech(place / "train", Tones())
    write_librispeech(place / "heldout", Tones(seconds=0.9))
    return place


# Of a tone that stands for a voice: they tell by their lengths what they are taken from.
LASTING = {"train": 0.8, "validation": 1.0, "heldout": 1.2}


@pytest.fixture
def spoken(monkeypatch):
    """Texts of the speech world, with a tone in the place of each voice; `asked` is for which."""

    def load(kind, split="train", count=None, synthesizers=()):
        load.asked.add((kind, split))
        count = count or 6
        tones = Tones(speakers_count=3, each=-(-count // 3), seconds=LASTING[split])
        sounds = [(tones.waveform(n) * 32767).to(torch.int16) for n in range(count)]
        lengths, said = [len(sound) for sound in sounds], grammar.texts(kind, split, count)
        names = tones.speakers[:count]
        return speech.Speech(torch.cat(sounds), lengths, said, names, f"{kind}{split}")

    load.asked = set()
    monkeypatch.setattr(speech, "load", load)
    return load


@pytest.fixture
def costs(monkeypatch):
    """What benches measure costs by."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("speech_costs")


@pytest.fixture
def in_this_process(costs, monkeypatch):
    """Processes of their own take seconds to start, and only the measured memory needs them."""
    monkeypatch.setattr(costs, "alone", lambda call, *arguments, gigabytes=None: call(*arguments))


@pytest.fixture
def take(costs, monkeypatch):
    """Call it, and steps of a bench take what it says, by arm: in seconds and in bytes."""

    def interleave(seconds, calls, rounds, warmup, base):
        samples = {arm: [seconds[arm]] * rounds for arm in calls}
        timings = {arm: timing.summarize(samples[arm], samples[base]) for arm in calls}
        return timing.Timings(timings, timing.Verdict(1, 1, 0.0, 0.0, ()))

    def told(module, seconds, memory):
        monkeypatch.setattr(module, "interleave", lambda *given: interleave(seconds, *given))
        monkeypatch.setattr(costs, "alone", lambda call, options, arm, *rest: memory[arm])

    return told


@pytest.fixture
def forbid_training(monkeypatch):
    """Call it, and a step of training is an error from then on."""

    def never(*_):
        raise AssertionError("something is trained again")

    return lambda: monkeypatch.setattr(loop._Run, "one_step", never)


@pytest.fixture
def trained_once(tmp_path, monkeypatch, forbid_training):
    """Call it: a bench's variants are trained, which writes nothing, then it tells by no training.

    Gives the tables that it writes.
    """

    def run(bench, slug, *told):
        monkeypatch.setattr(importlib.import_module("record"), "ROOT", tmp_path)
        words = [f"{bench.__name__}.py", "--folder", str(tmp_path / "runs"), *told]
        monkeypatch.setattr(sys, "argv", [*words, "--only", *bench.VARIANTS])
        bench.main()
        assert not (tmp_path / "results").exists()
        forbid_training()
        monkeypatch.setattr(sys, "argv", words)
        bench.main()
        return results.read(slug, tmp_path / "results").tables

    return run
