"""Healing layer by layer, putting subsets together, and the curve."""

import copy

import pytest
import torch

import pared
from pared import anatomy, layerwise
from pared.anatomy import presets
from pared.errors import InputError
from pared.healing import student_of
from pared.objectives.denoising import Denoising
from pared.objectives.distillation import captured
from pared.objectives.layerwise import Layerwise
from tests.objectives.test_distillation import data, teacher


def batch_of(model, count=4):
    return data(model).batch(torch.arange(count), torch.Generator().manual_seed(0))


def test_each_layer_sees_the_input_of_the_teachers():
    original = teacher()
    student = pared.convert(student_of(original), pared.EDiT())
    objective = Layerwise().bind(student, original)
    family, example = anatomy.of(original), anatomy.of(original).example(batch=2)
    seen = {}

    def watch(name, module):
        module.register_forward_pre_hook(lambda _, args: seen.update({name: args[0]}))

    last = objective.paths[-1]
    watch("teacher", original.get_submodule(last))
    watch("student", student.get_submodule(last))
    with torch.no_grad(), captured(original, objective.paths) as wanted:
        output = family.denoise(original, *example)
        with captured(student, objective.paths, handed_on=wanted) as got:
            forced_output = anatomy.of(student).denoise(student, *example)
    assert torch.equal(seen["student"], seen["teacher"])
    assert torch.equal(forced_output, output)
    assert got.keys() == wanted.keys()
    assert not torch.equal(got[last], wanted[last])


def test_joint_attentions_are_forced_in_both_streams():
    torch.manual_seed(0)
    original = presets.build("toy:sd3", device="cpu")
    student = pared.convert(copy.deepcopy(original), pared.MMEDiT())
    objective = Layerwise().bind(student, original)
    family = anatomy.of(original)
    latents, _, condition = family.example(batch=2)
    terms = objective(student, {"latents": latents} | condition, torch.Generator().manual_seed(0))
    terms["layers"].backward()
    assert student.transformer_blocks[0].attn.to_add_out.weight.grad.abs().sum() > 0


def test_no_layer_is_the_teacher_and_all_layers_are_the_student():
    original = teacher()
    healed = pared.convert(student_of(original), pared.EDiT())
    example = anatomy.of(original).example(batch=2)

    def output(model):
        with torch.no_grad():
            return anatomy.of(model).denoise(model, *example)

    none, all_ = (layerwise.assemble(original, healed, pared.EDiT(), n) for n in ((), (0, 1)))
    assert torch.equal(output(none), output(original.eval()))
    assert torch.equal(output(all_), output(healed.eval()))
    one = layerwise.assemble(original, healed, pared.EDiT(), (1,))
    names = set(one.state_dict()) - set(original.state_dict())
    assert names and all(name.startswith("transformer_blocks.1.attn1.") for name in names)


def test_healing_lowers_the_error_of_each_layer_and_the_curve_is_in_order(tmp_path):
    original, method, task = teacher(), pared.EDiT(), Denoising()
    fresh = pared.convert(student_of(original), method)
    healed = layerwise.heal_layers(
        original, method, data(original), tmp_path, task, steps=20, batch_size=8, learning_rate=3e-3
    )
    before, curve = (
        layerwise.search(original, model, method, data(original), task, count=16)
        for model in (fresh, healed)
    )
    assert all(curve.alone[block] < before.alone[block] for block in curve.alone)
    assert [len(choice.layers) for choice in curve.choices] == [0, 1, 2]
    assert curve.choices[1].layers == (min(curve.alone, key=curve.alone.get),)
    assert curve.choices[0].error == 0
    assert curve.choices[1].error == pytest.approx(min(curve.alone.values()))
    assert curve.choices[2].spec == "edit:layers=[0,1]"
    assert pared.parse(curve.choices[1].spec).layers == curve.choices[1].layers


def test_a_search_goes_on_and_draws_the_same_again(tmp_path):
    original = teacher()

    def healed(folder, steps):
        torch.seed()
        changes = {"steps": steps, "batch_size": 2}
        found = layerwise.heal_layers(original, pared.EDiT(), data(original), folder, **changes)
        return found.state_dict()

    healed(tmp_path / "stopped", 1)
    runs = [healed(tmp_path / name, 3) for name in ("stopped", "stopped", "whole")]
    for name, weight in runs[0].items():
        assert torch.equal(weight, runs[1][name]) and torch.equal(weight, runs[2][name]), name


def test_the_cheapest_within_an_error():
    choices = tuple(
        layerwise.Choice(tuple(range(n)), n / 10, 100 - n, f"edit:layers={list(range(n))}")
        for n in range(4)
    )
    curve = layerwise.Curve({}, choices)
    assert curve.within(0.25) == choices[2]
    assert curve.within(0) == choices[0]
    with pytest.raises(InputError, match="give 0 or more"):
        curve.within(-1)


def test_a_conversion_without_attention_is_refused(tmp_path):
    original = teacher()

    class Nothing(pared.EDiT):
        def claims(self, family):
            return []

        def convert(self, model):
            pass

    with pytest.raises(InputError):
        layerwise.heal_layers(original, Nothing(), data(original), tmp_path, steps=1)


def test_layers_that_run_twice_are_refused(tmp_path):
    original = teacher()
    with pytest.raises(InputError, match="can't be run twice, as gradient_checkpointing does"):
        layerwise.heal_layers(
            original, pared.EDiT(), data(original), tmp_path, steps=1, gradient_checkpointing=True
        )
    assert not list(tmp_path.iterdir())
