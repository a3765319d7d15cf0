"""A run goes on only from what it began from."""

import json

import pytest
import torch
from torch import nn

import pared
from pared.errors import InputError
from pared.healing import student_of
from pared.objectives.denoising import Denoising
from pared.objectives.wav2vec2 import Wav2Vec2Pretraining
from pared.training import train
from pared.training.beginning import beginning_of, check_beginning, numbers_of
from pared.training.checkpoints import latest
from tests.objectives.test_distillation import data, teacher
from tests.training import toys
from tests.training.toys import Fit, Points, net


def settings(**changes):
    return toys.settings(warmup=0, **changes)


def other(scale: float = 1e-3) -> nn.Module:
    """The net with one number of one layer moved."""
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1 + scale)
    return model


def test_other_weights_are_refused_and_the_run_s_own_go_on(tmp_path):
    model = net()
    chosen = settings(steps=3, ema=0.9)
    train(model, Fit(), Points(), chosen, tmp_path)
    for wrong in (other(), other(1e-4), nn.Sequential(*net(), nn.Linear(2, 2))):
        with pytest.raises(InputError, match="holds a run with other weights than this one beg"):
            train(wrong, Fit(), Points(), settings(steps=4, ema=0.9), tmp_path)
    # Rounding of another machine, the weights it came to, and those it began from.
    assert train(other(1e-7), Fit(), Points(), chosen, tmp_path).finished
    assert train(model, Fit(), Points(), settings(steps=4, ema=0.9), tmp_path).steps == 4
    assert train(net(), Fit(), Points(), settings(steps=5, ema=0.9), tmp_path).steps == 5


def test_a_run_without_its_beginning_goes_on(tmp_path):
    """As earlier versions wrote it."""
    train(net(), Fit(), Points(), settings(steps=2), tmp_path)
    path = latest(tmp_path) / "state.json"
    state = json.loads(path.read_text())
    del state["beginning"]
    path.write_text(json.dumps(state))
    assert train(other(), Fit(), Points(), settings(steps=3), tmp_path).steps == 3


def test_healing_another_student_or_by_another_teacher_is_another_run(tmp_path):
    original = teacher()

    def heal(r=2, by=original, task=None):
        student = pared.convert(student_of(original), pared.parse(f"clear:r={r}"))
        changes = {"steps": 1, "batch_size": 2}
        return pared.heal(student, by, data(original), tmp_path, task=task, **changes)

    assert heal().finished and heal().finished
    with pytest.raises(InputError, match="other conversions"):
        heal(r=4)
    with pytest.raises(InputError, match="another objective"):
        heal(task=Denoising("noise"))
    with pytest.raises(InputError, match="another objective"):
        heal(task=Denoising(alpha_bars=torch.linspace(0.99, 0.01, 1000)))
    finetuned = teacher()
    with torch.no_grad():
        for parameter in finetuned.parameters():
            parameter.mul_(1.001)
    with pytest.raises(InputError, match="another teacher"):
        heal(by=finetuned)
    assert heal().finished


def test_what_training_itself_changes_is_no_beginning():
    objective = Wav2Vec2Pretraining()
    before = beginning_of(net(), objective).words
    objective.at_step(1000)
    assert beginning_of(net(), objective).words == before
    json.dumps(before)


def test_all_tensors_are_read_by_their_names():
    weights = {
        "b": torch.arange(6.0).view(2, 3).bfloat16(),
        "a": torch.tensor(7),
        "c": torch.ones(0),
    }
    assert numbers_of(weights).tolist() == [7, 7, 2, 4]
    assert numbers_of({}).shape == (0,)
    mine = beginning_of(net(), Fit())
    check_beginning("folder", mine.words, mine.numbers, mine)
    check_beginning("folder", {}, {}, mine)
