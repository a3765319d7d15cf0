"""Sampling for every task: one loop for any family, with or without a given picture.

Stock pipelines of diffusers each serve one task and one family; a denoiser that was taught several
needs one that gives it the task, the given picture and as many passes as guidance asks for. One
that was distilled from guidance by the prompt gets the weight of it instead, in a single pass.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.guidance import classifier_free
from pared.guidance.sampling import refuse_guidance, scheduler_with
from pared.method import Conversion, denoiser, stack_of
from pared.objectives.endpoint import Gaussian, prior_of, reads_source, standard
from pared.objectives.guided import WEIGHT
from pared.worlds.datasets import encode_latents, upcast
from pared.worlds.tasks import Task, get

Condition = dict[str, Tensor]


@torch.no_grad()
def sample(
    pipeline: Any,
    task: str,
    prompts: Sequence[str],
    images: Tensor | None = None,
    steps: int = 20,
    guidance: float = 1.0,
    image_guidance: float = 1.0,
    size: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pictures for prompts, and for given pictures where the task reads one.

    Args:
        pipeline: a stock pipeline whose denoiser was taught the task.
        task: see `pared.worlds.tasks`.
        prompts: one for each picture; what they say depends on the task.
        images: uint8 (batch, 3, height, width), for tasks that read a picture.
        steps: of the scheduler.
        guidance: scale s_P of the prompt; 1 is none. A denoiser that was distilled from guidance
            is given the weight s_P - 1, and needs no pass without the prompt.
        image_guidance: scale s_I of the given picture; 1 is none.
        size: height and width in pixels, for tasks that read none; by default the model's own.
        generator: of the noise, on the CPU.

    Returns:
        Pictures (batch, 3, height, width) in [0, 1].

    Raises:
        InputError: an unknown task or one that the model wasn't taught, no picture where one is
            needed, or sizes that don't fit.
    """
    model: Any = denoiser(pipeline)
    device = pipeline._execution_device
    job, index = taught(pipeline, task)
    if size is not None:
        check_size(pipeline, *size)
    source = _source(pipeline, job, prompts, images)
    conditions = _conditions(pipeline, index, prompts, source)
    if WEIGHT in anatomy.of(model).inputs:
        weight = torch.full((len(prompts),), guidance - 1.0, device=device)
        conditions = {name: entry | {WEIGHT: weight} for name, entry in conditions.items()}
        guidance = 1.0
    scales = (image_guidance if job.reads_image else 1.0, guidance)
    endpoint = standard(torch.zeros(_shape(pipeline, len(prompts), source, size)))
    if (prior := prior_of(model)) is not None and source is not None:
        refuse_guidance(*scales)
        _onload(model)
        endpoint = prior(*source, conditions["both"])
    names = classifier_free.passes(*scales)
    with _scheduler(pipeline, endpoint if prior is not None else None) as scheduler:
        height, width = endpoint.mean.shape[-2:]
        anatomy.of(model).set_timesteps(scheduler, steps, (height, width))
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        y = endpoint.draw(generator or torch.default_generator).to(device, model.dtype)
        latents = y * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in pipeline.progress_bar(scheduler.timesteps):
            z = latents
            if hasattr(scheduler, "scale_model_input"):
                z = scheduler.scale_model_input(latents, t)
            predicted = {name: _predict(model, z, t, conditions[name]) for name in names}
            prediction = classifier_free.compose(predicted, *scales)
            latents = scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
    found = decode(pipeline.vae, latents)
    pipeline.maybe_free_model_hooks()
    return found


def _onload(model: Any) -> None:
    """Bring a denoiser that is offloaded to its device, as a call of it does."""
    if hasattr(model, "_hf_hook"):
        model._hf_hook.pre_forward(model)


@contextmanager
def _scheduler(pipeline: Any, endpoint: Gaussian | None) -> Iterator[Any]:
    """The pipeline's scheduler; within the context one that ends in `endpoint`, where given.

    It stands in the pipeline, where run-time methods look for the time.
    """
    own = pipeline.scheduler
    if endpoint is not None:
        pipeline.scheduler = scheduler_with(own, endpoint)
    try:
        yield pipeline.scheduler
    finally:
        pipeline.scheduler = own


def taught(pipeline: Any, task: str) -> tuple[Task, int | None]:
    """A task that a model can do, and the number under which the model knows it, if it has several.

    Raises:
        InputError: there is no such task, or the model wasn't taught it.
    """
    model: Any = denoiser(pipeline)
    reads_image = anatomy.of(model).channels > pipeline.vae.config.latent_channels
    return taught_by(stack_of(model), reads_image, task)


def taught_by(stack: Sequence[Conversion], reads_image: bool, task: str) -> tuple[Task, int | None]:
    """The same from a model's description.

    Args:
        stack: the conversions that it carries.
        reads_image: whether its input layer takes more than noised latents.
        task: name of the task.

    Raises:
        InputError: as for `taught`.
    """
    job = get(task)
    # Where several methods teach tasks, the one with the most has numbered them.
    known = max((m.tasks for m in stack if hasattr(m, "tasks")), key=len, default=None)
    if known is not None:
        if task not in known:
            raise InputError(
                f"this model was not taught {task!r}; it was taught {', '.join(known)}."
            )
        return job, known.index(task)
    if job.reads_image != reads_image:
        does = "only tasks that read a picture" if reads_image else "text-to-image alone"
        raise InputError(
            f"this model was not taught {task!r}: its input layer takes {does}; convert it with "
            "multi-task-upcycling or explicit-conditioning and train it."
        )
    return job, None


def _predict(model: nn.Module, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return anatomy.of(model).denoise(model, z, t.expand(len(z)).to(z.device), condition)


def _source(
    pipeline: Any, job: Task, prompts: Sequence[str], images: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Latents of the given pictures, mean and standard deviation; None where the task reads none.

    Raises:
        InputError: there are no pictures, not one for each prompt, or of a size that doesn't fit.
    """
    if not job.reads_image:
        return None
    if images is None:
        raise InputError(f"{job.name} needs a picture; give one for each prompt.")
    if len(images) != len(prompts):
        raise InputError(
            f"there are {len(images)} pictures for {len(prompts)} prompts; give one for each."
        )
    check_size(pipeline, *images.shape[-2:])
    device, dtype = pipeline._execution_device, cast(Any, denoiser(pipeline)).dtype
    mean, std = encode_latents(pipeline.vae, images, device)
    return mean.to(device, dtype), std.to(device, dtype)


def check_size(pipeline: Any, height: int, width: int) -> None:
    """Refuse a size in pixels that the model can't paint.

    Raises:
        InputError: a side isn't a multiple of `unit_of`.
    """
    unit = unit_of(pipeline)
    if min(height, width) < unit or height % unit or width % unit:
        raise InputError(
            f"pictures of {height} x {width} pixels don't fit the model; give a height and width "
            f"that are multiples of {unit}."
        )


def unit_of(pipeline: Any) -> int:
    """What sides of pictures must be multiples of, in pixels."""
    return _scale(pipeline) * anatomy.of(denoiser(pipeline)).patch


def _scale(pipeline: Any) -> int:
    """Pixels per latent pixel."""
    return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


def _shape(
    pipeline: Any,
    count: int,
    source: tuple[Tensor, Tensor] | None,
    size: tuple[int, int] | None,
) -> tuple[int, ...]:
    """Of the latents to paint: those of the given picture, or of the size asked for."""
    if source is not None:
        return tuple(source[0].shape)
    side, scale = anatomy.of(denoiser(pipeline)).sample_size, _scale(pipeline)
    height, width = (side, side) if size is None else (size[0] // scale, size[1] // scale)
    return count, pipeline.vae.config.latent_channels, height, width


def _conditions(
    pipeline: Any,
    index: int | None,
    prompts: Sequence[str],
    source: tuple[Tensor, Tensor] | None,
) -> dict[str, Condition]:
    """What each pass of guidance is given: both prompt and picture, the picture alone, neither."""
    model: Any = denoiser(pipeline)
    device = pipeline._execution_device
    encoded = anatomy.of(model).encode(pipeline, ["", *prompts])
    count = len(prompts)

    def moved(entry: Tensor) -> Tensor:
        return entry.to(device, model.dtype if entry.is_floating_point() else None)

    common: Condition = {}
    if index is not None:
        common["task"] = torch.full((count,), index, device=device)
    text = {name: moved(entry[1:]) for name, entry in encoded.items()}
    null = {
        name: moved(entry[:1].expand(count, *entry.shape[1:])) for name, entry in encoded.items()
    }
    if source is None:
        return {"both": common | text, "image": common | null, "none": common | null}
    given, nothing = {"source": source[0]}, {"source": torch.zeros_like(source[0])}
    if not reads_source(model):  # the picture is in the endpoint alone
        given, nothing = {}, {}
    return {
        "both": common | text | given,
        "image": common | null | given,
        "none": common | null | nothing,
    }


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures in [0, 1] from latents on the denoiser's scale, (batch, 3, height, width)."""
    shift = vae.config.shift_factor or 0.0
    with upcast(vae):
        pixels = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
