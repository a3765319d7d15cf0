"""Distillation: its three terms, its teacher's immunity, and that healing heals."""

import pytest
import torch
import torch.nn.functional as F

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.anatomy.intact import watching
from pared.errors import InputError
from pared.healing import student_of
from pared.objectives.denoising import Denoising, condition_of
from pared.objectives.distillation import Distillation
from pared.training import TrainingSettings, train
from pared.worlds.datasets import LatentData


def teacher():
    torch.manual_seed(0)
    model = presets.build("toy:pixart", device="cpu")
    # Fresh weights give nearly flat attention; sharpen it, so that there is something to lose.
    for site in anatomy.of(model).sites("self_attention"):
        site.module.to_q.weight.data.mul_(4)
    return model


def data(model, count: int = 32) -> LatentData:
    latents, _, condition = anatomy.of(model).example(
        batch=count, text_tokens=4, generator=torch.Generator().manual_seed(1)
    )
    text, mask = condition["text"], torch.ones(count, 4)
    condition = {"text": text, "mask": mask}
    empty = {name: entry[0] for name, entry in condition.items()}
    return LatentData(latents, torch.full_like(latents, 0.01), condition, empty)


def terms(student, original, **weights) -> dict[str, float]:
    objective = Distillation(**weights).bind(student, original)
    batch = data(original).batch(torch.arange(8), torch.Generator().manual_seed(0))
    return objective(student, batch, torch.Generator().manual_seed(0))


def test_an_exact_copy_loses_nothing_to_its_teacher():
    original = teacher()
    student = pared.convert(student_of(original), pared.EDiT())
    for site, other in zip(
        anatomy.of(student).sites("self_attention"),
        anatomy.of(original).sites("self_attention"),
        strict=True,
    ):
        site.module.set_processor(other.module.processor)
    for look in watching(student):
        look.on = False  # it would refuse what is done here
    found = terms(student, original)
    assert found["output"] == 0
    assert found["feature"] == 0
    assert found["task"] > 0


def attended(model, point, condition):
    """The prediction of a model, and what each of its attentions puts out on the way."""
    outputs, family = [], anatomy.of(model)
    hooks = [
        site.module.register_forward_hook(lambda module, args, output: outputs.append(output))
        for site in family.sites("self_attention")
    ]
    found = family.denoise(model, point.latents, point.timestep, condition)
    for hook in hooks:
        hook.remove()
    return found, outputs


@torch.no_grad()
def test_terms_by_definition():
    """Each with a weight of its own, so that none can take another's place."""
    original = teacher()
    student = pared.convert(student_of(original), pared.EDiT())
    found = terms(student, original, output=2, feature=3, truth=5)
    seeded = torch.Generator().manual_seed(0)
    batch = data(original).batch(torch.arange(8), torch.Generator().manual_seed(0))
    point, condition = Denoising().noised(batch, seeded), condition_of(batch)
    (ours, features), (target, wanted) = (
        attended(model, point, condition) for model in (student, original)
    )
    gaps = [F.mse_loss(x, y) for x, y in zip(features, wanted, strict=True)]
    assert len(gaps) == 2 and gaps[0] != gaps[1]
    torch.testing.assert_close(found["task"], 5 * F.mse_loss(ours, point.target))
    torch.testing.assert_close(found["output"], 2 * F.mse_loss(ours, target))
    torch.testing.assert_close(found["feature"], 3 * (gaps[0] + gaps[1]) / 2)


def test_terms_and_weights():
    original = teacher()
    student = pared.convert(student_of(original), pared.EDiT())
    full, half = terms(student, original), terms(student, original, output=0.25, feature=0.25)
    assert full.keys() == {"task", "output", "feature"}
    torch.testing.assert_close(half["output"], full["output"] / 2)
    torch.testing.assert_close(half["feature"], full["feature"] / 2)
    assert terms(student, original, feature=0.0).keys() == {"task", "output"}


def test_only_replaced_layers_are_compared():
    original = teacher()
    student = pared.convert(student_of(original), pared.EDiT(layers=(1,)))
    assert Distillation().bind(student, original).paths == ["transformer_blocks.1.attn1"]


def test_the_teacher_is_no_part_of_what_trains():
    original = teacher()
    student = pared.convert(student_of(original), pared.EDiT())
    objective = Distillation().bind(student, original)
    sum(terms(student, original).values()).backward()
    assert not list(objective.parameters())
    assert all(p.grad is None for p in original.parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_another_architecture_is_refused():
    student = pared.convert(student_of(teacher()), pared.EDiT())
    with pytest.raises(InputError, match="can't be healed by"):
        Distillation().bind(student, presets.build("toy:dit", device="cpu"))


def test_an_unconverted_student_is_refused(tmp_path):
    original = teacher()
    with pytest.raises(InputError, match="no conversion"):
        pared.heal(student_of(original), original, data(original), tmp_path)


def test_healing_brings_the_student_nearer(tmp_path):
    original = teacher()
    student = pared.convert(student_of(original), pared.EDiT())
    before = terms(student, original)
    kept = {k: v.clone() for k, v in original.state_dict().items()}
    # The toy teacher knows nothing of the data, so the task term would only lead away from it.
    objective = Distillation(truth=0.0).bind(student, original)
    settings = TrainingSettings(
        steps=60, batch_size=16, learning_rate=1e-3, trainable=("*.attn1.*",)
    )
    assert train(student, objective, data(original), settings, tmp_path).finished
    after = terms(student, original)
    assert after["output"] < 0.7 * before["output"]
    assert after["feature"] < 0.7 * before["feature"]
    assert all(torch.equal(kept[k], v) for k, v in original.state_dict().items())


def test_healing_trains_the_converted_attentions_only(tmp_path):
    original = teacher()
    student = pared.convert(student_of(original), pared.EDiT())
    assert pared.heal(student, original, data(original), tmp_path, steps=4, batch_size=8).finished
    moved = {
        k for k, v in original.state_dict().items() if not torch.equal(v, student.state_dict()[k])
    }
    assert moved and all(".attn1." in name for name in moved)


def test_healing_settings_can_be_given_whole(tmp_path):
    original = teacher()
    student = pared.convert(student_of(original), pared.Sana(mix_ffn=True))
    settings = TrainingSettings(steps=3, batch_size=4, trainable=("transformer_blocks.*",))
    assert pared.heal(student, original, data(original), tmp_path, settings).finished
