"""Data of several tasks at once, encoded beforehand, as the training loop draws it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pared import anatomy
from pared.errors import InputError
from pared.method import denoiser
from pared.worlds import tasks as tasks_of
from pared.worlds.datasets import encode_latents, fingerprint, origin
from pared.worlds.tasks import Examples

PLAIN = ("text-to-image",)


class TaskData:
    """Examples of several tasks, of which every batch holds equally many.

    Each picture and each text is encoded once, however many examples and tasks share it. Position j
    of a batch belongs to task j modulo their number. Batches hold

    - `latents`, `latent_std`: posterior mean and standard deviation of the picture that is wanted,
      on the scale of latents;
    - the condition that the denoiser's family takes of the text (`text`, `mask`, `pooled`);
    - `source`, `source_std`: the same of the picture that is given; zeros for a task that is given
      none, and where the picture is dropped;
    - `task`: int64, (batch,), index into `tasks`.

    The last three are left out where the only task is text-to-image. How often texts and pictures
    are dropped, for guidance, `pared.worlds.tasks.TASKS` says.

    Args:
        pipeline: a stock pipeline with autoencoder, text encoders and denoiser.
        examples: of each task; all pictures of one size.
        drop: whether texts and pictures are dropped.
        tasks: names of all that the model knows, in its order; by default those of `examples`.

    Raises:
        InputError: there are no examples, two of one task, of a task that isn't among `tasks`, or
            of different sizes.
    """

    def __init__(
        self,
        pipeline: Any,
        examples: Sequence[Examples],
        drop: bool = True,
        tasks: Sequence[str] | None = None,
    ) -> None:
        names = [each.task for each in examples]
        self.tasks = tuple(names if tasks is None else tasks)
        self.drop = drop
        _check(examples, self.tasks)
        self._drawn = [tasks_of.get(name) for name in names]
        self._index = torch.tensor([self.tasks.index(name) for name in names])

        pictures, places = _once([each.images for each in examples])
        self._origin = origin(pipeline, pictures, [t for each in examples for t in each.texts])
        self.latents, self.latent_std = encode_latents(
            pipeline.vae, pictures, pipeline._execution_device
        )
        texts = dict.fromkeys(text for each in examples for text in each.texts)
        number = {text: n for n, text in enumerate(texts, start=1)}
        # Row 0 is the empty prompt.
        self.condition = anatomy.of(denoiser(pipeline)).encode(pipeline, ["", *texts])
        # Of each task: which latents are given, which are wanted, which text.
        self._rows = [
            (
                own[torch.tensor(each.before if task.reads_image else each.after)],
                own[torch.tensor(each.after)],
                torch.tensor([number[text] for text in each.texts]),
            )
            for each, own, task in zip(examples, places, self._drawn, strict=True)
        ]

    def __len__(self) -> int:
        """As many as show each example of the largest task once, on average."""
        return len(self._rows) * max(len(after) for _, after, _ in self._rows)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `pared.training.data.Dataset`.

        Raises:
            InputError: the batch doesn't divide over the tasks.
        """
        count = len(self._rows)
        if len(indices) % count:
            raise InputError(
                f"a batch of {len(indices)} doesn't divide over {count} tasks; choose a multiple "
                f"of {count} for each process's micro-batches."
            )
        task = torch.arange(len(indices)) % count
        before, after, text = (torch.empty_like(task) for _ in range(3))
        for n, rows in enumerate(self._rows):
            own = indices[n::count] // count % len(rows[1])
            before[n::count], after[n::count], text[n::count] = (of[own] for of in rows)

        without_text, without_image = self._dropped(task, generator)
        text[without_text] = 0
        batch = {"latents": self.latents[after], "latent_std": self.latent_std[after]}
        batch |= {name: entry[text] for name, entry in self.condition.items()}
        if self.tasks == PLAIN:
            return batch
        reads = torch.tensor([each.reads_image for each in self._drawn])[task]
        kept = (reads & ~without_image).to(self.latents).view(-1, 1, 1, 1)
        return batch | {
            "source": kept * self.latents[before],
            "source_std": kept * self.latent_std[before],
            "task": self._index[task].to(self.latents.device),
        }

    def _dropped(self, task: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which samples go without their text, and which without their picture, (batch,) each."""
        drawn = torch.rand(len(task), generator=generator)
        if not self.drop:
            return drawn < 0, drawn < 0
        chances = torch.tensor([[t.drop_both, t.drop_text, t.drop_image] for t in self._drawn])
        both, text, image = chances.cumsum(1)[task].T
        return drawn < text, (drawn < both) | ((drawn >= text) & (drawn < image))

    @property
    def empty(self) -> dict[str, Tensor]:
        """The condition for the empty prompt, without the first dimension."""
        return {name: entry[0] for name, entry in self.condition.items()}

    @property
    def nbytes(self) -> int:
        """Memory that latents and conditions hold."""
        return sum(x.nbytes for x in (self.latents, self.latent_std, *self.condition.values()))

    def to(self, device: torch.device) -> TaskData:
        """The same on another device."""
        moved = copy.copy(self)
        moved.latents, moved.latent_std = self.latents.to(device), self.latent_std.to(device)
        moved.condition = {name: entry.to(device) for name, entry in self.condition.items()}
        return moved

    def only(self, names: Sequence[str], tasks: Sequence[str] | None = None) -> TaskData:
        """The same without the examples of other tasks; nothing is encoded again.

        Args:
            names: of the tasks to keep.
            tasks: names of all that the model knows, in its order; by default `names`.

        Raises:
            InputError: there are no examples of one of them, or it isn't among `tasks`.
        """
        here = [task.name for task in self._drawn]
        known = tuple(names if tasks is None else tasks)
        if missing := [name for name in names if name not in here or name not in known]:
            raise InputError(
                f"{missing[0]} can't be kept: there are examples of {', '.join(here)}, and the "
                f"model knows {', '.join(known)}."
            )
        part = copy.copy(self)
        part.tasks = known
        part._drawn = [tasks_of.get(name) for name in names]
        part._rows = [self._rows[here.index(name)] for name in names]
        part._index = torch.tensor([known.index(name) for name in names])
        return part

    def identity(self) -> str:
        rows = [index for of in self._rows for index in of]
        drawn = fingerprint(self._index, *rows)
        kept = "" if self.drop else "-kept"
        return f"{'+'.join(self.tasks)}-{self._origin}-{drawn}{kept}"


def _check(examples: Sequence[Examples], tasks: tuple[str, ...]) -> None:
    names = [each.task for each in examples]
    if not names:
        raise InputError("there are no examples; give those of one task at least.")
    for each in examples:
        task = tasks_of.get(each.task)
        if each.task not in tasks:
            raise InputError(
                f"there are examples of {each.task}, which is none of the tasks "
                f"{', '.join(tasks)}; leave them out, or add the task."
            )
        if names.count(each.task) > 1:
            raise InputError(f"there are several examples of {each.task}; put them into one.")
        if not len(each):
            raise InputError(f"there are no examples of {each.task}; give at least one.")
        if task.reads_image and len(each.before) != len(each):
            raise InputError(
                f"{len(each)} examples of {each.task} have {len(each.before)} pictures to start "
                "from; each needs one."
            )
    sizes = {tuple(each.images.shape[-2:]) for each in examples}
    if len(sizes) > 1:
        listed = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise InputError(f"the tasks' pictures are {listed} pixels; make them one size.")


def _once(sets: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All different pictures, and for each set where its own are among them."""
    seen: dict[bytes, int] = {}
    pictures: list[Tensor] = []
    places = []
    for images in sets:
        own = []
        for image in images:
            digest = hashlib.sha256(image.numpy().tobytes()).digest()
            if digest not in seen:
                seen[digest] = len(pictures)
                pictures.append(image)
            own.append(seen[digest])
        places.append(torch.tensor(own))
    return torch.stack(pictures), places
