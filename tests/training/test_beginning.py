"""A run goes on only from what it began from."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pared
from pared import info
from pared.anatomy import presets
from pared.errors import InputError
from pared.guidance.explicit_conditioning import ExplicitConditioning
from pared.healing import student_of
from pared.method import Conversion, drawn_in
from pared.objectives import explicit
from pared.objectives.denoising import Denoising
from pared.objectives.endpoint import prior_of
from pared.objectives.wav2vec2 import Wav2Vec2Pretraining
from pared.training import train
from pared.training.beginning import beginning_of, check_beginning, numbers_of
from pared.training.checkpoints import BEGINNING, latest
from pared.tuning.adapters import load_adapter, save_adapter
from pared.worlds.datasets import LatentData
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


# Weights that a conversion has just drawn ---------------------------------------------------------

DRAWING = ["edit", "linfusion", "multi-task-upcycling:experts=2", "lora:r=2"]


def drawn_anew(original, spec="edit"):
    """A student as another process makes it."""
    torch.seed()
    return pared.convert(student_of(original), pared.parse(spec))


def healed(student, original, folder, steps=1):
    run = pared.heal(student, original, data(original), folder, steps=steps, batch_size=2)
    assert (run.finished, run.steps) == (True, steps)
    return student


@pytest.mark.parametrize("spec", DRAWING)
def test_a_student_converted_anew_goes_on_with_the_run_s_weights(spec, tmp_path):
    original = teacher()
    first = drawn_anew(original, spec)
    whole = healed(copy.deepcopy(first), original, tmp_path / "whole", steps=4)
    healed(first, original, tmp_path / "run", steps=2)
    found = healed(drawn_anew(original, spec), original, tmp_path / "run", steps=4)
    wanted = whole.state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in found.state_dict().items())
    again = healed(drawn_anew(original, spec), original, tmp_path / "run", steps=4)
    assert all(torch.equal(weight, wanted[name]) for name, weight in again.state_dict().items())


def test_another_base_is_another_run_whatever_is_drawn(tmp_path):
    original, other = teacher(), teacher()
    with torch.no_grad():
        other.proj_out.weight.mul_(1.001)
    healed(drawn_anew(original), original, tmp_path)
    with pytest.raises(InputError, match="other weights"):
        healed(drawn_anew(other), original, tmp_path)
    with pytest.raises(InputError, match="another teacher"):
        healed(drawn_anew(original), other, tmp_path)


def test_what_a_folder_holds_is_compared_in_full(tmp_path):
    """As `pared heal` does: what was drawn once is no longer drawn anew."""
    original = teacher()
    for name in ("one", "other"):
        pared.save(drawn_anew(original), tmp_path / name)
    assert drawn_in(drawn_anew(original)) and not drawn_in(pared.load(tmp_path / "one"))
    healed(pared.load(tmp_path / "one"), original, tmp_path / "run")
    with pytest.raises(InputError, match="other weights"):
        healed(pared.load(tmp_path / "other"), original, tmp_path / "run")
    healed(pared.load(tmp_path / "one"), original, tmp_path / "run", steps=2)


def test_an_adapter_from_a_file_is_compared(tmp_path):
    original = teacher()
    for name in ("one", "other"):
        save_adapter(drawn_anew(original, "lora:r=2"), tmp_path / f"{name}.safetensors")

    def adapted(name):
        return load_adapter(student_of(original), tmp_path / f"{name}.safetensors")

    assert not drawn_in(adapted("one"))
    healed(adapted("one"), original, tmp_path / "run")
    with pytest.raises(InputError, match="other weights"):
        healed(adapted("other"), original, tmp_path / "run", steps=2)


def test_what_has_trained_is_compared_in_full(tmp_path):
    """A second run begins from what the first one made of the weights that were drawn."""
    original = teacher()
    one, other = (healed(drawn_anew(original), original, tmp_path / n) for n in ("one", "other"))
    assert not drawn_in(one)
    healed(one, original, tmp_path / "second", steps=2)
    with pytest.raises(InputError, match="other weights"):
        healed(other, original, tmp_path / "second", steps=2)


def test_the_names_grow_with_conversions_and_copies_keep_them():
    model = presets.build("toy:pixart", device="cpu")
    assert drawn_in(model) == frozenset()
    before = set(model.state_dict())
    pared.convert(model, pared.EDiT(layers=(0,)))
    first = drawn_in(model)
    pared.convert(model, pared.parse("lora:r=2"))
    assert first and first < drawn_in(model) == drawn_in(copy.deepcopy(model))
    assert before.isdisjoint(drawn_in(model)) and drawn_in(model) <= set(model.state_dict())
    assert not any("base_layer" in name for name in drawn_in(model)), "moved, and not drawn"
    now = drawn_in(model)
    assert drawn_in(pared.convert(model, pared.EDiT(layers=(0,)))) == now


CONVERSIONS = [r for r in info.registry().values() if issubclass(r.load(), Conversion)]


@pytest.mark.parametrize("record", CONVERSIONS, ids=lambda record: record.slug)
def test_all_that_a_conversion_draws_is_noted_and_saved(record):
    """Else a run of what was converted anew would be refused, or would go on otherwise."""
    base = presets.build(f"toy:{record.families[0]}", device="cpu")
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(pared.convert(copy.deepcopy(base), record.load()()))
    one, other = models
    drawn = drawn_in(one)
    assert drawn == drawn_in(other)
    left = [numbers_of(model.state_dict(), drawn) for model in models]
    assert torch.equal(*left)
    unsaved = [set(dict(m.named_buffers())) - set(m.state_dict()) for m in models]
    for name in unsaved[0]:
        assert torch.equal(one.get_buffer(name), other.get_buffer(name)), name


def test_a_run_that_was_kept_in_full_goes_on_and_one_of_other_weights_is_refused(tmp_path):
    """Earlier versions kept numbers of all weights."""
    original = teacher()
    student = drawn_anew(original)
    full = numbers_of(student.state_dict())
    healed(student, original, tmp_path)
    path = latest(tmp_path) / BEGINNING
    kept = load_file(path)
    assert kept["weights"].shape == full.shape
    save_file(kept | {"weights": full}, path)
    healed(drawn_anew(original), original, tmp_path, steps=2)
    path = latest(tmp_path) / BEGINNING
    fewer = {name: kept[name][:-2] for name in ("weights", "now", "averaged")}
    save_file(kept | fewer, path)
    with pytest.raises(InputError, match="other weights"):
        healed(drawn_anew(original), original, tmp_path, steps=3)


def test_weights_of_other_names_are_refused(tmp_path):
    """Of equal shapes, in the same order: as a version that renamed them would find them."""
    original = teacher()
    healed(drawn_anew(original), original, tmp_path)
    path = latest(tmp_path) / "model.safetensors"
    weights = load_file(path)
    name = max(weights)
    save_file({k: w for k, w in weights.items() if k != name} | {f"{name}_": weights[name]}, path)
    with pytest.raises(InputError, match="weights that don't fit this model"):
        healed(drawn_anew(original), original, tmp_path, steps=2)


# What an objective fits before the first step -----------------------------------------------------


@dataclass
class Edits(LatentData):
    """Latents with given ones beside them."""

    def batch(self, indices, generator):
        batch = super().batch(indices, generator)
        return batch | {"source": batch["latents"] + 1, "source_std": batch["latent_std"]}


def editing(student, original, folder, steps):
    edits = Edits(**vars(data(original)))
    run = pared.heal(student, original, edits, folder, steps=steps, batch_size=2)
    assert run.steps == steps
    return student


def moved(fit):
    """A fit as a machine makes it that rounds otherwise."""

    def elsewhere(prior, *args, **settings):
        fit(prior, *args, **settings)
        with torch.no_grad():
            for weight in prior.prompt.parameters():
                weight.mul_(1 + 1e-4)

    return elsewhere


def test_a_prior_that_is_fitted_anew_elsewhere_is_that_of_the_run(tmp_path, monkeypatch):
    fit = explicit.fit_prompt_vae
    monkeypatch.setattr(explicit, "fit_prompt_vae", lambda *a: fit(*a, steps=3))
    original = teacher()
    pared.save(pared.convert(student_of(original), ExplicitConditioning()), tmp_path / "saved")
    here = editing(pared.load(tmp_path / "saved"), original, tmp_path / "run", 1)
    mine = copy.deepcopy(prior_of(here).state_dict())
    monkeypatch.setattr(explicit, "fit_prompt_vae", moved(explicit.fit_prompt_vae))
    there = editing(pared.load(tmp_path / "saved"), original, tmp_path / "run", 2)
    found = prior_of(there).state_dict()
    assert found and all(torch.equal(weight, mine[name]) for name, weight in found.items())


def test_a_prior_that_came_fitted_is_compared(tmp_path, monkeypatch):
    fit = explicit.fit_prompt_vae
    monkeypatch.setattr(explicit, "fit_prompt_vae", lambda *a: fit(*a, steps=3))
    original = teacher()
    student = pared.convert(student_of(original), ExplicitConditioning())
    pared.save(editing(student, original, tmp_path / "first", 1), tmp_path / "saved")
    editing(pared.load(tmp_path / "saved"), original, tmp_path / "run", 1)
    other = pared.load(tmp_path / "saved")
    with torch.no_grad():
        prior_of(other).prompt.head.weight.mul_(1 + 1e-4)
    with pytest.raises(InputError, match="other weights"):
        editing(other, original, tmp_path / "run", 2)
