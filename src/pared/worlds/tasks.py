"""The tasks that one denoiser can learn, what each one feeds it, and what it is learnt from."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pared.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


# Sides of the picture that upscaling makes, over those of the picture that it is given.
UPSCALING = 4


@dataclass(frozen=True)
class Task:
    """One job of a denoiser.

    Attributes:
        name: in settings, recipes and calls.
        reads_image: whether the denoiser is given the latents of a picture, behind the noised ones.
        text: what the prompt says.
        drop_text: chance of training without the prompt.
        drop_image: chance of training without the picture.
        drop_both: chance of training without either.
    """

    name: str
    reads_image: bool
    text: str
    drop_text: float = 0.1
    drop_image: float = 0.0
    drop_both: float = 0.0


TASKS = {
    task.name: task
    for task in (
        Task("text-to-image", False, "what to paint"),
        # Chances of InstructPix2Pix (arXiv 2211.09800), whose guidance needs both kinds.
        Task("edit", True, "what to change", 0.05, 0.05, 0.05),
        Task("upscale", True, "what the picture shows"),
        Task("inpaint", True, "what to remove"),
    )
}


def get(name: str) -> Task:
    """A task by name.

    Raises:
        InputError: there is none of that name.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the tasks are {', '.join(TASKS)}."
    raise InputError(f"there is no task {name!r}; {hint}")


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of one task; row i of `before`, `after`, `texts` and `captions` belongs together.

    Pictures are held once, however many examples they occur in.

    Attributes:
        task: name of the task.
        images: uint8, (pictures, 3, size, size).
        before: index of the picture that is given; empty for a task that is given none.
        after: index of the picture that is wanted.
        texts: the prompt: a caption or an instruction.
        captions: what the picture shows before and after, where that is known.
    """

    task: str
    images: Tensor
    before: list[int]
    after: list[int]
    texts: list[str]
    captions: list[tuple[str, str]] | None = None

    def __len__(self) -> int:
        return len(self.after)
