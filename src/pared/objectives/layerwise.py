"""Distillation of every converted attention by itself, all of them in one pass.

    L = mean_l ||attn_s^l(x^l) - attn_t^l(x^l)||^2 / ||attn_t^l(x^l)||^2

x^l is the teacher's own input of layer l: each attention of the student sees what the teacher's
sees, and hands on what the teacher's gives. So no layer depends on another, and any subset of them
can be put into the teacher afterwards. The per-layer term is that of EDiT (arXiv 2503.16726) and
LinFusion (arXiv 2409.02097); teacher's inputs and relative errors are chosen here.
"""

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.objectives.denoising import condition_of
from pared.objectives.distillation import Distillation, captured


class Layerwise(Distillation):
    """The per-layer term alone, each layer on the teacher's input. Weights as in the module."""

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        noised, condition = self.task.noised(batch, generator), condition_of(batch)
        student, teacher = anatomy.of(model), anatomy.of(self.teacher)
        with torch.no_grad(), captured(teacher.model, self.paths) as wanted:
            teacher.denoise(self.teacher, noised.latents, noised.timestep, condition)
        with captured(student.model, self.paths, handed_on=wanted) as got:
            student.denoise(model, noised.latents, noised.timestep, condition)
        errors = [relative_error(got[name], wanted[name]) for name in got if name in wanted]
        return {"layers": torch.stack(errors).mean()}


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """||got - wanted||^2 / ||wanted||^2 over everything, in float32."""
    got, wanted = got.float(), wanted.float()
    return (got - wanted).square().sum() / wanted.square().sum().clamp(min=1e-20)
