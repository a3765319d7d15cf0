"""Healing: train a converted model against the model it came from, as its methods' papers do."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pared import anatomy
from pared.errors import InputError
from pared.method import denoiser, stack_of
from pared.objectives.denoising import Denoising
from pared.training import Dataset, Run, TrainingSettings, train
from pared.training.precision import in_float32


def heal(
    student: nn.Module,
    teacher: nn.Module,
    data: Dataset,
    folder: str | Path,
    settings: TrainingSettings | None = None,
    task: Denoising | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    **changes: object,
) -> Run:
    """Train `student` in place until it paints like `teacher`.

    The objective is that of the student's last conversion whose paper has one of its own; where
    none has, it is the denoiser's task. Meanwhile both are in float32, where small steps aren't
    rounded away, and afterwards in their own types again; `precision="bf16"` computes in bfloat16.

    Args:
        student: a converted model (or a pipeline that holds one).
        teacher: the model before conversion, or its pipeline, whose scheduler says what it was
            trained to predict; put in eval mode, never trained.
        data: latents with conditions, see `pared.worlds.datasets.LatentData`.
        folder: takes checkpoints and the log; a run that was stopped goes on from there.
        settings: training settings; by default 1,000 steps of AdamW at the `learning_rate` of the
            last conversion that trains, in which only what the methods name as `trainable`
            trains, mostly what they replaced.
        task: what the denoiser predicts, and from which noise; by default what the teacher's
            pipeline says, of a bare denoiser flow.
        on_step: called after each step with its number and mean loss terms.
        changes: single settings to change, e.g. `steps=200, batch_size=16`.

    Returns:
        The run; `student` carries the healed weights.

    Raises:
        InputError: the student carries no conversion, or teacher and student differ in kind.
    """
    if task is None:
        task = task_of(teacher) if hasattr(teacher, "scheduler") else Denoising()
    student, teacher = denoiser(student), denoiser(teacher)
    if not (stack := stack_of(student)):
        raise InputError(
            "the student carries no conversion; convert it first, "
            "e.g. pared.convert(model, EDiT())."
        )
    if not (healed := [m for m in stack if m.info.training]):
        raise InputError(f"{stack[0].info.slug} changes no outputs and needs no healing.")
    own = [objective for m in healed if (objective := m.healing(task)) is not task]
    objective = own[-1] if own else task
    objective.bind(student, teacher, data)
    if settings is None:
        family = anatomy.of(student)
        trainable = tuple(pattern for m in healed for pattern in m.trainable(family))
        rate = healed[-1].learning_rate
        settings = TrainingSettings(steps=1000, learning_rate=rate, trainable=trainable)
    settings = TrainingSettings(**(settings.model_dump() | changes))
    with in_float32(student, teacher):
        return train(student, objective, data, settings, folder, on_step)


def task_of(pipeline: Any, **settings: Any) -> Denoising:
    """The prediction that a pipeline's scheduler expects of its denoiser, on its noise schedule.

    Args:
        pipeline: its scheduler decides; schedulers of flows have no entry for the prediction.
        settings: of `Denoising`, laid over what the scheduler says, e.g. `prediction="v"` or
            `time_sampling="logit_normal"`.

    Raises:
        InputError: a prediction or a schedule that pared doesn't train for.
    """
    scheduler = pipeline.scheduler
    kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
    known = {"epsilon": "noise", "v_prediction": "v", "flow_prediction": "flow"}
    if (prediction := settings.pop("prediction", known.get(kind))) is None:
        raise InputError(f"the scheduler predicts {kind!r}; pared heals {', '.join(known)}.")
    if prediction == "flow":
        return Denoising("flow", **settings)
    if (alpha_bars := getattr(scheduler, "alphas_cumprod", None)) is None:
        raise InputError(
            f"{type(scheduler).__name__} has no alphas_cumprod, the schedule of noise that its "
            f"denoiser was trained on; give the pipeline one that has, e.g. DDIMScheduler."
        )
    return Denoising(prediction, **{"alpha_bars": alpha_bars} | settings)


def student_of(teacher: nn.Module) -> nn.Module:
    """A trainable copy of a model, ready to be converted."""
    return copy.deepcopy(anatomy.unwrap(teacher)).requires_grad_(True)
