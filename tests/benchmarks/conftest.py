"""What tests of speech benches share: voices to learn from, and no second process or training."""

import importlib

import pytest

from pared.training import loop
from tests.docs.markdown import ROOT
from tests.worlds.tones import Tones, write_librispeech


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Four talkers of three tones each, once to learn from and once, longer, to be judged by."""
    place = tmp_path_factory.mktemp("voices")
    write_librispeech(place / "train", Tones())
    write_librispeech(place / "heldout", Tones(seconds=0.9))
    return place


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
def forbid_training(monkeypatch):
    """Call it, and a step of training is an error from then on."""

    def never(*_):
        raise AssertionError("something is trained again")

    return lambda: monkeypatch.setattr(loop._Run, "one_step", never)
