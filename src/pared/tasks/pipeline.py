"""A stock pipeline that can be asked for a task.

    >>> pipe = pared.with_tasks(pared.load("my-multi-task-model"))
    >>> pipe("make it green", image=picture, task="edit").images[0]

Nothing is wrapped: the pipeline stays what it is, an instance of its own class that saves and loads
as before, and calls without a task are the stock ones.
"""

from collections.abc import Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from pared.errors import InputError
from pared.tasks.sampling import check_size, sample, taught, unit_of
from pared.worlds.readers.items import Unusable, upright_rgb
from pared.worlds.readers.triplets import blanked
from pared.worlds.tasks import UPSCALING, Task

Picture = Image.Image


class Painted(BaseOutput):
    """What a pipeline's call gives: `images`, a list of pictures."""

    images: list[Picture]


class TaskCalls:
    """The call of a pipeline, with tasks. Mixed into the pipeline's own class by `with_tasks`."""

    def __call__(self, *args: Any, task: str | None = None, **call: Any) -> Any:
        """Do a task, or what the stock pipeline does where none is named.

        Args:
            args: the prompt; for the stock pipeline whatever it takes.
            task: "text-to-image", "edit", "upscale" or "inpaint".
            call: `image`, `mask`, and the arguments of `paint`; those of the stock pipeline else.
        """
        if task is None:
            return super().__call__(*args, **call)  # type: ignore[misc]
        return Painted(images=paint(self, task, *args, **call))


def with_tasks(pipeline: Any) -> Any:
    """Let a pipeline's call take `task`, `image` and `mask`.

    Args:
        pipeline: a stock pipeline; it is changed in place.

    Returns:
        The pipeline.
    """
    cls = type(pipeline)
    if not issubclass(cls, TaskCalls):

        @wraps(cls.__call__)  # whose arguments are read where guidance is, say
        def call(self: Any, *args: Any, **given: Any) -> Any:
            return TaskCalls.__call__(self, *args, **given)

        # Under its own name, which is what saving writes down.
        own = {"__doc__": cls.__doc__, "__call__": call}
        pipeline.__class__ = type(cls.__name__, (TaskCalls, cls), own)
    return pipeline


def paint(
    pipeline: Any,
    task: str,
    prompt: str | Sequence[str],
    image: Picture | Sequence[Picture] | None = None,
    mask: Picture | Sequence[Picture] | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    image_guidance_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    generator: torch.Generator | None = None,
    fill: bool = False,
) -> list[Picture]:
    """Pictures from prompts, and from given pictures where the task reads one.

    Args:
        pipeline: whose denoiser was taught the task.
        task: its name.
        prompt: one or several; an instruction for "edit", what to remove for "inpaint", otherwise
            what the picture shows.
        image: the given picture, or one for each prompt.
        mask: for "inpaint": white where the picture may change, one for each picture; without it
            the model finds what to remove by itself.
        num_inference_steps: of the scheduler.
        guidance_scale: of the prompt; 1 is none.
        image_guidance_scale: of the given picture; 1 is none.
        height: of the result in pixels, a multiple of the model's unit; by default that of the
            given picture (four times that for "upscale"), or the model's own.
        width: likewise.
        generator: of the noise.
        fill: whether the model was taught by pictures that were blank under their masks, and is to
            see the given ones so: then it fills in what `prompt` says, and removes nothing.

    Raises:
        InputError: the task is unknown or wasn't taught, or what was given doesn't fit it.
    """
    job, _ = taught(pipeline, task)
    image, mask = _upright(image, "white"), _upright(mask, "black")
    if fill and mask is None:
        raise InputError("there is nothing to fill in without a mask; give one.")
    prompts, pictures, masks = checked(job, prompt, image, mask)
    size = _size(pipeline, height, width)
    tensor = None
    if job.reads_image and pictures:
        pictures = [_fitted(p, _target(p, job, size, unit_of(pipeline))) for p in pictures]
        seen = list(map(blanked, pictures, masks)) if fill else pictures
        tensor = torch.stack([_tensor(p) for p in _same_size(seen)])
    found = sample(
        pipeline,
        task,
        prompts,
        tensor,
        num_inference_steps,
        guidance_scale,
        image_guidance_scale,
        size,
        generator,
    )
    painted = [_picture(x) for x in found]
    if masks:
        painted = [
            Image.composite(new, old, m.convert("L").resize(new.size))
            for new, old, m in zip(painted, pictures, masks, strict=True)
        ]
    return painted


def _upright(given: Any, ground: str) -> Any:
    """Given pictures as training reads them: upright, in RGB, on one ground."""
    try:
        if given is None or isinstance(given, Image.Image):
            return given and upright_rgb(given, ground)
        return [upright_rgb(each, ground) for each in given]
    except Unusable as fault:
        raise InputError(f"a given picture can't be used: {fault}; give one in RGB.") from None


def checked(
    job: Task,
    prompt: str | Sequence[str],
    image: Picture | Sequence[Picture] | None,
    mask: Picture | Sequence[Picture] | None,
) -> tuple[list[str], list[Picture], list[Picture]]:
    """Prompts, pictures and masks as lists, once they are found to go with a task.

    Raises:
        InputError: they don't.
    """
    prompts = _prompts(prompt, job)
    pictures = _listed(image, len(prompts), "image")
    masks = _listed(mask, len(prompts), "mask")
    if pictures and not job.reads_image:
        raise InputError(f"{job.name} reads no picture; leave the image out.")
    if masks and job.name != "inpaint":
        raise InputError(f"{job.name} takes no mask; leave it out.")
    for number, given in enumerate(masks):
        _check_mask(given, pictures[number] if pictures else None)
    return prompts, pictures, masks


def _prompts(prompt: str | Sequence[str], job: Task) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or (job.name != "upscale" and not all(p.strip() for p in prompts)):
        raise InputError(f"{job.name} needs a prompt that says {job.text}.")
    return prompts


def _listed(given: Any, count: int, what: str) -> list[Picture]:
    """Given pictures as a list, one for each prompt; a single one serves all."""
    if given is None:
        return []
    found = [given] * count if isinstance(given, Image.Image) else list(given)
    if len(found) != count:
        raise InputError(
            f"there are {len(found)} {what}s for {count} prompts; give one, or one for each."
        )
    return found


def _target(
    picture: Picture, job: Task, size: tuple[int, int] | None, unit: int
) -> tuple[int, int]:
    """Width and height of the result for one picture."""
    if size is not None:
        return size[1], size[0]
    scale = UPSCALING if job.name == "upscale" else 1
    # The nearest size that the model can paint.
    width, height = (max(unit, round(scale * side / unit) * unit) for side in picture.size)
    return width, height


def _fitted(picture: Picture, size: tuple[int, int]) -> Picture:
    return picture.resize(size, Image.Resampling.BICUBIC)


def _same_size(pictures: list[Picture]) -> list[Picture]:
    sizes = sorted({p.size for p in pictures})
    if len(sizes) > 1:
        raise InputError(
            f"pictures of one call must be of one size; these come out as {sizes[0]} and "
            f"{sizes[1]}: give height and width, or call once for each."
        )
    return pictures


def _check_mask(mask: Picture, picture: Picture | None) -> None:
    if picture is not None and mask.size != picture.size:
        raise InputError(
            f"the mask is {mask.size[0]} x {mask.size[1]} pixels and its picture "
            f"{picture.size[0]} x {picture.size[1]}; give a mask of the picture's size."
        )
    if not mask.convert("L").getbbox():
        raise InputError("the mask is all black; make white what may change.")


def _size(pipeline: Any, height: int | None, width: int | None) -> tuple[int, int] | None:
    """The size that was asked for, once it is found to suit the model."""
    if height is None and width is None:
        return None
    if height is None or width is None:
        raise InputError("give both height and width, or neither.")
    check_size(pipeline, height, width)
    return height, width


def _tensor(picture: Picture) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def _picture(pixels: Tensor) -> Picture:
    array = (255 * pixels).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
