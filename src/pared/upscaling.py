"""Larger pictures than a model was trained for: painted small, enlarged, noised and refined.

    x_0 at the model's size;  x_k = denoise(noise(resize(x_{k-1}), strength))

SDEdit (arXiv 2108.01073) in a chain, whole pictures and no patches, as LinFusion (arXiv 2409.02097)
and CLEAR (arXiv 2412.16112) sample beyond 1024 pixels. Linear attention is what makes it pay: with
softmax attention each doubling of the side costs sixteen times as much in attention.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

from pared.errors import InputError


def coarse_to_fine(
    pipeline: Any,
    prompt: str | list[str],
    scales: Sequence[float] = (2,),
    strength: float = 0.7,
    **call: Any,
) -> list[Any]:
    """Paint at the usual size, then refine at multiples of it, one after the other.

    Args:
        pipeline: a text-to-image pipeline of a kind that diffusers also has for image-to-image.
        prompt: what to paint.
        scales: sides of the pictures over those of the first, ascending.
        strength: how much noise is put on each enlarged picture, in (0, 1]; CLEAR's is 0.7.
        call: further arguments of the pipeline's call, for all stages (a size, for the first).

    Returns:
        Pictures of the last size.

    Raises:
        InputError: the pipeline has no image-to-image form, or scales or strength don't fit.
    """
    if not scales or list(scales) != sorted(set(scales)) or scales[0] <= 1:
        raise InputError(
            f"scales {list(scales)} don't ascend from above 1; give e.g. 2, or 2 and 4."
        )
    if not 0 < strength <= 1:
        raise InputError(f"strength {strength:g} can't be; give more than 0 and at most 1.")
    if int(call.get("num_inference_steps", 1 / strength) * strength) < 1:
        raise InputError(
            f"{call['num_inference_steps']} steps at strength {strength:g} leave none to refine; "
            f"give at least {math.ceil(1 / strength)}."
        )
    refine = image_to_image(pipeline)
    takes = inspect.signature(type(refine).__call__).parameters
    images = pipeline(prompt=prompt, **call).images
    unit = pipeline.vae_scale_factor * (getattr(_denoiser(pipeline), "patch_size", None) or 1)
    first = images[0].size
    call = {name: value for name, value in call.items() if name in takes}
    for scale in scales:
        width, height = (round(side * scale / unit) * unit for side in first)
        size = {"width": width, "height": height}
        call |= {name: side for name, side in size.items() if name in takes}
        enlarged = [image.resize((width, height)) for image in images]
        images = refine(prompt=prompt, image=enlarged, strength=strength, **call).images
    return list(images)


def image_to_image(pipeline: Any) -> Any:
    """The image-to-image pipeline of the same parts.

    Raises:
        InputError: diffusers has none of this kind.
    """
    from diffusers import AutoPipelineForImage2Image

    try:
        found = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError:
        raise InputError(
            f"diffusers has no image-to-image form of {type(pipeline).__name__}, which refining "
            "needs; leave the scales out, or take a Stable Diffusion or FLUX pipeline."
        ) from None
    found.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return found


def _denoiser(pipeline: Any) -> Any:
    from pared.method import denoiser

    return denoiser(pipeline).config
