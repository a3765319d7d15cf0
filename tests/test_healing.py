"""What a pipeline says of the task its denoiser was trained for, and that healing listens."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import pared
from pared.errors import InputError
from pared.healing import student_of, task_of
from pared.objectives.denoising import Denoising
from tests.objectives.test_distillation import data, teacher


def holder(scheduler):
    return SimpleNamespace(scheduler=scheduler)


@pytest.mark.parametrize(
    "schedule",
    [
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},  # DiT, PixArt
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},  # U-Nets
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
def test_the_noise_is_that_of_the_scheduler(schedule):
    scheduler = diffusers.DDIMScheduler(**schedule)
    task = task_of(holder(scheduler))
    wanted = {"epsilon": "noise", "v_prediction": "v"}[scheduler.config.prediction_type]
    assert task.prediction == wanted
    batch = {"latents": torch.zeros(64, 1, 2, 2)}
    noised = task.noised(batch, torch.Generator().manual_seed(0))
    latents, t, target = noised.latents, noised.timestep, noised.target
    assert t.max() < scheduler.config.num_train_timesteps
    # Of zeros nothing is left but noise, of which the velocity is alpha times.
    spread = (1 - task.alpha_bars[t]).sqrt().view(-1, 1, 1, 1)
    noise = target if wanted == "noise" else latents / spread
    torch.testing.assert_close(latents, scheduler.add_noise(batch["latents"], noise, t))
    if wanted == "v":
        torch.testing.assert_close(target, scheduler.get_velocity(batch["latents"], noise, t))


def test_schedulers_of_flows_say_flow():
    solver = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(), solver):
        task = task_of(holder(scheduler), time_sampling="logit_normal")
        assert (task.prediction, task.time_sampling) == ("flow", "logit_normal")


def test_what_no_one_trains_for_is_refused():
    with pytest.raises(InputError, match="the scheduler predicts 'sample'"):
        task_of(holder(diffusers.DDIMScheduler(prediction_type="sample")))
    with pytest.raises(InputError, match="EDMEulerScheduler has no alphas_cumprod"):
        task_of(holder(diffusers.EDMEulerScheduler()))


def test_settings_lie_over_what_the_scheduler_says():
    scheduler = diffusers.DDIMScheduler(beta_end=0.03)
    task = task_of(holder(scheduler), prediction="v")
    assert task.prediction == "v" and torch.equal(task.alpha_bars, scheduler.alphas_cumprod)
    task = task_of(holder(scheduler), prediction="flow", time_sampling="logit_normal")
    assert (task.prediction, task.time_sampling) == ("flow", "logit_normal")
    assert task_of(holder(diffusers.DDIMScheduler(prediction_type="sample")), prediction="v")


@pytest.mark.parametrize(
    ("scheduler", "settings", "told"),
    [
        (diffusers.DDIMScheduler, {"prediction": "epsilon"}, "'epsilon' doesn't exist; give noise"),
        (diffusers.DDIMScheduler, {"time_sampling": "normal"}, "'normal' doesn't exist; give unif"),
        (diffusers.DDIMScheduler, {"time_sampling": "logit_normal"}, "flows, .* predicts 'noise'"),
        (diffusers.FlowMatchEulerDiscreteScheduler, {"prediction": "v"}, "has no alphas_cumprod"),
    ],
)
def test_settings_that_can_not_be_are_refused(scheduler, settings, told):
    with pytest.raises(InputError, match=told):
        task_of(holder(scheduler()), **settings)


@pytest.mark.parametrize("task", [None, Denoising("v")])
def test_a_pipeline_says_its_task_where_nobody_else_does(task, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(pared.EDiT, "healing", lambda self, task: told.append(task) or task)
    original = teacher()
    student = pared.convert(student_of(original), pared.EDiT())
    scheduler = diffusers.DDPMScheduler(beta_end=0.03)
    pipeline = SimpleNamespace(transformer=original, scheduler=scheduler, components={})
    changes = {"steps": 1, "batch_size": 2}
    pared.heal(student, pipeline, data(original), tmp_path, task=task, **changes)
    if task is not None:
        assert told == [task]
        return
    assert told[0].prediction == "noise"
    assert torch.equal(told[0].alpha_bars, scheduler.alphas_cumprod)


def test_half_precision_heals_in_float32_and_keeps_its_types(tmp_path):
    original = teacher()
    student = pared.convert(student_of(original), pared.EDiT())
    for model in (original, student):
        model.to(torch.bfloat16)
    kept = student.transformer_blocks[0].scale_shift_table
    kept.data = kept.data.float()  # as some models keep some
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    # So small a step is rounded away in bfloat16.
    changes = {"steps": 3, "batch_size": 2, "learning_rate": 1e-5}
    run = pared.heal(student, original, data(teacher()), tmp_path, **changes)
    assert run.finished and kept.dtype == torch.float32
    types = {name: weight.dtype for name, weight in student.named_parameters()}
    assert types == {name: weight.dtype for name, weight in before.items()}
    assert {weight.dtype for weight in original.parameters()} == {torch.bfloat16}
    trained = load_file(next(tmp_path.glob("checkpoint-*")) / "model.safetensors")
    moved = [name for name in before if not torch.equal(trained[name], before[name].float())]
    assert moved and {trained[name].dtype for name in moved} == {torch.float32}
