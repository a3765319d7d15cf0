"""Distillation of classifier-free guidance into one pass that reads the guidance weight.

Stage one of On Distillation of Guided Diffusion Models (arXiv 2210.03142, CVPR 2023):

    L = E_{w ~ U[w_min, w_max], t, x, eps} omega(lambda_t) ||x_s(z_t, c, w) - x_t^w(z_t, c)||^2
    x_t^w = (1 + w) x_t(z_t, c) - w x_t(z_t, null)

The times are those that the teacher was trained on, and every sample has its own w.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.nn.diffusion import guided
from pared.objectives.denoising import Denoising, condition_of
from pared.objectives.distillation import Distillation
from pared.objectives.paths import Path, Weighting

# The entry of the condition that carries w.
WEIGHT = "guidance_weight"


class Guided(Distillation):
    """The error against the guided teacher.

    Batch: as for `Denoising`. The student must read the entry "guidance_weight" of its condition.

    Args:
        w_min: smallest guidance weight; diffusers' guidance_scale is 1 + w.
        w_max: largest one.
        weighting: omega, see `pared.objectives.paths.Weighting`.
        task: what the denoiser predicts.
        null: the condition without a prompt, (...) per entry, no batch dimension: the `empty` of
            `pared.worlds.datasets.LatentData`. Entries that aren't in it stay those of the batch.

    Raises:
        InputError: there are no weights from `w_min` to `w_max`.
    """

    def __init__(
        self,
        w_min: float = 0.0,
        w_max: float = 14.0,
        weighting: Weighting = "velocity",
        task: Denoising | None = None,
        null: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(task, output=1.0, feature=0.0, truth=0.0)
        if not 0 <= w_min <= w_max:
            raise InputError(
                f"guidance weights from {w_min:g} to {w_max:g} can't be drawn; give w_min from 0 "
                "up to w_max."
            )
        self.w_min, self.w_max, self.weighting, self.null = w_min, w_max, weighting, null or {}

    def bind(self, student: nn.Module, teacher: nn.Module, data: Any = None) -> "Guided":
        """Set the teacher (never trained); the data's `empty` is the null condition where none is.

        Raises:
            InputError: the null condition isn't known, the student reads no guidance weight, or
                teacher and student aren't of one architecture.
        """
        self.null = self.null or getattr(data, "empty", {})
        if not self.null:
            raise InputError(
                "a guided teacher needs the condition without a prompt: give it as null, or heal "
                "with data that have it as `empty`."
            )
        require_weight(student)
        super().bind(student, teacher)
        self.path = Path.of(self.task)
        return self

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        noised, condition = self.task.noised(batch, generator), condition_of(batch)
        z, timestep = noised.latents, noised.timestep
        w = drawn_weights(len(z), self.w_min, self.w_max, generator).to(z.device)
        null = {
            name: entry.to(z.device).expand(len(z), *entry.shape)
            for name, entry in self.null.items()
        }
        teacher, student = anatomy.of(self.teacher), anatomy.of(model)
        with torch.no_grad():
            conditional = teacher.denoise(self.teacher, z, timestep, condition).float()
            unconditional = teacher.denoise(self.teacher, z, timestep, condition | null).float()
            target = guided(conditional, unconditional, w)
        prediction = student.denoise(model, z, timestep, condition | {WEIGHT: w}).float()
        level = self.path.level(self.path.time(timestep))
        return {"guided": self.path.error(prediction, target, level, self.weighting)}


def drawn_weights(count: int, w_min: float, w_max: float, generator: torch.Generator) -> Tensor:
    """A guidance weight for each sample of a batch, uniform, (count,)."""
    return w_min + (w_max - w_min) * torch.rand(count, generator=generator)


def require_weight(student: nn.Module) -> None:
    """Refuse a student that would learn the same for every guidance weight.

    Raises:
        InputError: it has no input for one.
    """
    if WEIGHT not in anatomy.of(student).inputs:
        raise InputError(
            "the student reads no guidance weight; convert it first with guidance-distillation."
        )
