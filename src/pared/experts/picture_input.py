"""InstructPix2Pix: Learning to Follow Image Editing Instructions.

arXiv 2211.09800, CVPR 2023.

The denoiser also reads the latents of a given picture: its input layer gets as many channels again,
which start at zero, behind those of the noised latents; then everything trains. Guidance takes up
to three passes per step, without prompt and picture, with the picture, with both.

Implemented from the paper; no code taken. Chosen here: an input layer for each task, so that a
model may learn several and keep its text-to-image, whose layer stays as it is; with the tasks
("text-to-image", "edit") the second one is the paper's. Not verified: quality at the paper's scale.
"""

from typing import Any

from pydantic import Field, field_validator
from torch import nn

from pared import anatomy
from pared.anatomy import Family
from pared.experts.task_layers import (
    Tasks,
    checked,
    put_input_layer,
    require_words_and_convolution,
)
from pared.info import Info
from pared.method import Claim, Conversion
from pared.worlds import tasks as known

INFO = Info(
    slug="picture-input",
    title="InstructPix2Pix: Learning to Follow Image Editing Instructions",
    arxiv="2211.09800",
    venue="CVPR 2023",
    kind="conversion",
    families=("unet", "pixart", "sd3"),
    training=True,
    trained_by="recipe",
    exact=False,
    maturity="faithful",
    summary="the denoiser also reads a given picture, by an input layer for each task",
    cls="PictureInput",
)


class PictureInput(Conversion):
    """Task input layers, section 3.2 of the paper."""

    info = INFO

    tasks: tuple[str, ...] = Field(
        default=tuple(known.TASKS),
        min_length=1,
        description="what is learnt; the first is what calls without a task get, those of stock "
        "pipelines among them",
    )

    @field_validator("tasks")
    @classmethod
    def _of_known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return checked(tasks)

    @property
    def serves(self) -> int:
        return len(self.tasks)

    def claims(self, family: Family) -> list[Claim]:
        require_words_and_convolution(family, self.info.slug)
        return [Claim(family.input_layer, "replaces")]

    def trainable(self, family: Family) -> tuple[str, ...]:
        return ("*",)

    def convert(self, model: nn.Module) -> None:
        family = anatomy.of(model)
        put_input_layer(family, Tasks(self.tasks, family.input("task")))

    def healing(self, task: Any) -> Any:
        """The plain task loss, on batches that mix tasks."""
        return task
