"""Stage one of guidance distillation: what the student is compared with, and who gets which w."""

import pytest
import torch

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.healing import student_of
from pared.objectives.denoising import Denoising, condition_of
from pared.objectives.guided import WEIGHT, Guided, drawn_weights
from pared.objectives.paths import Path
from pared.worlds.datasets import Balanced, LatentData

FAMILIES = ("unet", "pixart", "sd3", "dit")


def pair(family: str = "pixart"):
    """A teacher and its fresh student."""
    torch.manual_seed(0)
    teacher = presets.build(f"toy:{family}", device="cpu")
    return pared.convert(student_of(teacher), pared.GuidanceDistillation()).eval(), teacher


def data(model, count: int = 8) -> LatentData:
    latents, _, condition = anatomy.of(model).example(
        count, 8, 8, text_tokens=4, generator=torch.Generator().manual_seed(1)
    )
    null = {name: entry[0] for name, entry in anatomy.of(model).example(1, 8, 8, 4)[2].items()}
    return LatentData(latents, torch.full_like(latents, 0.01), condition, null, drop=0.0)


def loss(student, teacher, held, kind="flow", seed=0, **settings) -> torch.Tensor:
    objective = Guided(task=Denoising(kind), null=held.empty, **settings).bind(student, teacher)
    batch = held.batch(torch.arange(len(held)), torch.Generator().manual_seed(0))
    return objective(student, batch, torch.Generator().manual_seed(seed))["guided"]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_guidance_a_fresh_student_loses_nothing(family):
    student, teacher = pair(family)
    held = data(teacher)
    assert loss(student, teacher, held, w_min=0.0, w_max=0.0) == 0
    assert loss(student, teacher, held, w_min=2.0, w_max=2.0) > 0


@pytest.mark.parametrize("kind", ["flow", "v", "noise"])
@pytest.mark.parametrize("weighting", ["velocity", "truncated_snr"])
def test_the_loss_is_the_weighted_error_to_the_guided_teacher(kind, weighting):
    """Word for word from the paper, in the clean estimates."""
    student, teacher = pair()
    held, w = data(teacher), 3.0
    task, family = Denoising(kind), anatomy.of(teacher)
    batch = held.batch(torch.arange(len(held)), torch.Generator().manual_seed(0))
    point = task.noised(batch, torch.Generator().manual_seed(5))
    z, timestep, path = point.latents, point.timestep, Path.of(task)
    level = path.level(path.time(timestep))
    null = {name: torch.stack([entry] * len(z)) for name, entry in held.empty.items()}
    with torch.no_grad():
        x_c, x_u = (
            path.clean(family.denoise(teacher, z, timestep, condition), z, level)
            for condition in (condition_of(batch), null)
        )
        # A fresh student is the conditional teacher.
        error = x_c - ((1 + w) * x_c - w * x_u)
    snr = (level.alpha / level.sigma) ** 2
    omega = snr.clamp(min=1)
    if weighting == "velocity":
        omega = level.sigma**-2 if kind == "flow" else snr + 1
    wanted = (omega.view(-1, 1, 1, 1) * error**2).mean()
    found = loss(student, teacher, held, kind, 5, w_min=w, w_max=w, weighting=weighting)
    # Clean estimates near t = 0 are small differences of float32 numbers.
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-3, atol=0)


def test_every_sample_has_its_own_weight(monkeypatch):
    student, teacher = pair()
    given = {}
    plain = type(anatomy.of(student))._denoise

    def spy(self, model, latents, timestep, condition):
        given[model is teacher] = condition.get(WEIGHT)
        return plain(self, model, latents, timestep, condition)

    monkeypatch.setattr(type(anatomy.of(student)), "_denoise", spy)
    loss(student, teacher, data(teacher), w_min=2.0, w_max=14.0)
    assert given[True] is None
    assert len(given[False].unique()) == 8
    assert ((given[False] >= 2) & (given[False] <= 14)).all()


def test_weights_fill_their_range_and_come_from_the_generator():
    w = drawn_weights(4000, 2.0, 14.0, torch.Generator().manual_seed(0))
    assert 2 <= w.min() < 2.1 and 13.9 < w.max() <= 14
    assert w.mean() == pytest.approx(8, abs=0.2)  # 12 / sqrt(12 x 4000) = 0.05 is one deviation
    assert torch.equal(w, drawn_weights(4000, 2.0, 14.0, torch.Generator().manual_seed(0)))


def test_gradients_reach_the_student_alone():
    student, teacher = pair()
    loss(student, teacher, data(teacher)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.adaln_single.emb.timestep_embedder.guidance.linear_2.weight.grad.any()


def test_healing_takes_the_null_condition_from_the_data(tmp_path):
    student, teacher = pair()
    balanced = Balanced(data(teacher), torch.ones(8))
    assert pared.heal(student, teacher, balanced, tmp_path, steps=2, batch_size=4).finished


def test_what_has_no_null_condition_is_refused(tmp_path):
    student, teacher = pair()

    class Bare:
        pass

    with pytest.raises(InputError, match="needs the condition without a prompt"):
        pared.heal(student, teacher, Bare(), tmp_path)


def test_a_student_without_the_input_is_refused():
    _, teacher = pair()
    with pytest.raises(InputError, match="reads no guidance weight"):
        Guided(null=data(teacher).empty).bind(student_of(teacher), teacher)
