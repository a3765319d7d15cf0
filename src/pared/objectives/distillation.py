"""Distillation of a converted model from the model it was converted from.

    L = L_task + a ||pred_s - pred_t||^2 + b mean_l ||attn_s^l - attn_t^l||^2

As EDiT (arXiv 2503.16726) trains: task, prediction and per-layer feature terms, the features being
the outputs of every converted attention (after its output projection, before its gate; a joint
attention has two, the image's and the text's). Each student layer sees the student's own input. The
weights 1 / 0.5 / 0.5, the mean over layers and mean-squared errors in float32 are those of
LinFusion's released training (arXiv 2409.02097); EDiT doesn't state its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.method import stack_of
from pared.objectives.denoising import Denoising, condition_of


class Distillation(nn.Module):
    """Task, prediction and feature terms against a frozen teacher.

    Args:
        task: what the denoiser predicts.
        output: the weight a of the prediction term.
        feature: the weight b of the feature term.
        truth: the weight of the task term; 0 learns from the teacher alone.
    """

    def __init__(
        self,
        task: Denoising | None = None,
        output: float = 0.5,
        feature: float = 0.5,
        truth: float = 1.0,
    ) -> None:
        super().__init__()
        self.task = task or Denoising()
        self.output, self.feature, self.truth = output, feature, truth
        self.paths: list[str] = []

    def bind(self, student: nn.Module, teacher: nn.Module, data: Any = None) -> "Distillation":
        """Set the teacher (never trained) and the layers to compare.

        Those are the attentions that the student's stack replaced.

        Args:
            student: carries conversions.
            teacher: the model that it came from.
            data: what it will be trained on; some objectives need to know of it beforehand.

        Raises:
            InputError: teacher and student aren't of one architecture.
        """
        if (mine := type(anatomy.unwrap(student))) is not (other := type(anatomy.unwrap(teacher))):
            raise InputError(
                f"a {mine.__name__} can't be healed by a {other.__name__}; give the model it came "
                "from."
            )
        family = anatomy.of(teacher)
        known = {s.path for s in family.sites("self_attention", "joint_attention")}
        claimed = {
            c.site for m in stack_of(student) for c in m.claims(family) if c.how == "replaces"
        }
        self.paths = sorted(known & claimed)
        # A tuple hides the teacher from .parameters() and state dicts: it is no part of what
        # trains.
        self._teacher = (teacher.eval(),)
        return self

    @property
    def teacher(self) -> nn.Module:
        """The teacher."""
        if not hasattr(self, "_teacher"):
            raise InputError("a distillation needs its teacher first: call bind(student, teacher).")
        return self._teacher[0]

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        noised, condition = self.task.noised(batch, generator), condition_of(batch)
        student, teacher = anatomy.of(model), anatomy.of(self.teacher)
        paths = self.paths if self.feature else []
        with torch.no_grad(), captured(teacher.model, paths) as wanted:
            target = teacher.denoise(
                self.teacher, noised.latents, noised.timestep, condition
            ).float()
        with captured(student.model, paths) as got:
            prediction = student.denoise(model, noised.latents, noised.timestep, condition).float()
        terms = {
            "task": self.truth * F.mse_loss(prediction, noised.target),
            "output": self.output * F.mse_loss(prediction, target),
        }
        if paths:
            both = [name for name in got if name in wanted]
            errors = [F.mse_loss(got[name].float(), wanted[name].float()) for name in both]
            terms["feature"] = self.feature * torch.stack(errors).mean()
        return terms

    def to(self, *args, **kwargs) -> "Distillation":
        if hasattr(self, "_teacher"):
            self._teacher[0].to(*args, **kwargs)
        return super().to(*args, **kwargs)


@contextmanager
def captured(
    model: nn.Module, paths: list[str], handed_on: dict[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Within the context, the latest output of each module in `paths`, by path.

    The second output of a module with two, the text's, is under "PATH:text", where it is computed.

    Args:
        model: holds the modules.
        paths: of the modules.
        handed_on: what the modules hand on in the place of their own outputs, under the same names.
    """
    outputs: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> Any:
            streams = output if isinstance(output, tuple) else (output,)
            named = list(zip((path, f"{path}:text"), streams, strict=False))
            outputs.update({name: stream for name, stream in named if stream is not None})
            if handed_on is None:
                return None
            others = tuple(None if stream is None else handed_on[name] for name, stream in named)
            return others if isinstance(output, tuple) else others[0]

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
