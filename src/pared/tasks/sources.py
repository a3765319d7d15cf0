"""Where a task's examples come from: the emoji world, or the user's own pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pared.worlds.tasks import UPSCALING, Examples

if TYPE_CHECKING:
    from torch import Tensor

EMOJI = "emoji"


def examples_of(
    task: str, source: str, size: int, split: str | None = "train", on_bad: str = "refuse"
) -> Examples:
    """Examples of one task.

    Args:
        task: name of the task.
        source: "emoji"; captioned pictures for text-to-image and upscaling, which degrades them
            itself; before, instruction and after for the others (see
            `pared.worlds.readers.triplets`).
        size: height and width in pixels.
        split: of the emoji world: "train", "heldout", or None for both.
        on_bad: what to do with examples that can't be used: "refuse" or "skip".

    Raises:
        InputError: the source isn't there, or holds what can't be used.
    """
    from pared.worlds.emoji import edits

    if source == EMOJI:
        return edits.MAKERS[task](size=size, split=split)
    if task in ("text-to-image", "upscale"):
        return _captioned(task, source, size, on_bad)
    from pared.worlds.readers.triplets import read_triplets

    return read_triplets(source, size=size, on_bad=on_bad, task=task)


def _captioned(task: str, source: str, size: int, on_bad: str) -> Examples:
    """Captioned pictures as they are, or degraded to be made sharp again."""
    import torch

    from pared.worlds.datasets import fitted
    from pared.worlds.readers import read

    items = read(source, on_bad)
    texts = [item.caption for item in items]
    after, rows = fitted(items, size), list(range(len(texts)))
    if task == "text-to-image":
        return Examples(task, after, [], rows, texts)
    before = [len(rows) + row for row in rows]
    return Examples(task, torch.cat([after, _degraded(after)]), before, rows, texts)


def _degraded(images: Tensor) -> Tensor:
    """What a camera and the web make of pictures (uint8), at their own size again."""
    import torch

    from pared.worlds.degradations import Degradation, degrade, enlarge

    generator = torch.Generator().manual_seed(0)
    small = degrade(images, generator, scale=UPSCALING, settings=Degradation())
    return enlarge(small, (images.shape[-2], images.shape[-1]))
