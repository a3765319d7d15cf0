"""What `pared edit`, `pared upscale` and `pared inpaint` share: a picture in, a picture out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pared.cli import common
from pared.cli.models import config_of, locate
from pared.errors import InputError

Command = Callable[..., Any]

PICTURE = click.Path(path_type=Path)


def painting_options(command: Command) -> Command:
    """The options of all commands that repaint a picture."""
    for option in reversed(
        (
            common.with_option("runtime"),
            click.option("--steps", type=click.IntRange(1), default=20, show_default=True,
                         help="Denoising steps."),
            click.option("--guidance", type=click.FloatRange(0), default=1.0, show_default=True,
                         help="Guidance scale of the words; 1 needs one pass per step."),
            click.option("--image-guidance", type=click.FloatRange(0), default=1.0,
                         show_default=True, help="Guidance scale of the picture."),
            click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
                         help="Of the noise."),
            click.option("--size", type=click.IntRange(8),
                         help="Longer side of the result in pixels; by default that of the input, "
                         "upscaled four times that."),
            click.option("-o", "--output", type=PICTURE, required=True, help=".png file to write."),
            common.device_option,
            common.dtype_option,
        )
    ):  # fmt: skip
        command = option(command)
    return command


def repaint(
    task: str,
    model: str,
    picture: Path,
    words: str,
    output: Path,
    specs: tuple[str, ...],
    mask: Path | None = None,
    fill: bool = False,
    **call: Any,
) -> None:
    """Do a task on one picture and write the result; all that can be refused is refused first."""
    if fill and mask is None:
        raise InputError("--fill fills in what a mask marks; give --mask, too.")
    common.records_of(specs, "runtime")
    source = locate(model)
    source.require_pipeline("painting")
    if output.suffix != ".png":
        raise InputError(f"{output} isn't named .png; give the name of a .png file.")
    common.check_file(output, "picture.png")
    image, covered = _opened(picture), None if mask is None else _opened(mask, "black")
    where = common.device_of(call.pop("device"))
    methods = common.runtime_methods_of(specs)
    _check(source.folder(), task, words, image, covered)
    pipeline = source.load(common.dtype_of(call.pop("dtype")), where)

    from contextlib import nullcontext

    import torch

    from pared.cli import pictures
    from pared.method import apply
    from pared.tasks.pipeline import paint
    from pared.tasks.sampling import unit_of

    sides: dict[str, int] = {}
    if (size := call.pop("size")) is not None:
        unit = unit_of(pipeline)
        longer = max(image.size)
        width, height = (
            max(unit, round(side * size / longer / unit) * unit) for side in image.size
        )
        sides = {"width": width, "height": height}
    with apply(pipeline, *methods) if methods else nullcontext():
        (found,) = paint(
            pipeline,
            task,
            words,
            image,
            covered,
            num_inference_steps=call["steps"],
            guidance_scale=call["guidance"],
            image_guidance_scale=call["image_guidance"],
            generator=torch.Generator().manual_seed(call["seed"]),
            fill=fill,
            **sides,
        )
    click.echo(pictures.save(found, output))


def _check(folder: Path, task: str, words: str, image: Any, mask: Any) -> None:
    """Refuse what doesn't go together, before any weights are loaded."""
    from pared import anatomy
    from pared.bench.targets import read
    from pared.method import stack_of
    from pared.tasks.pipeline import checked
    from pared.tasks.sampling import taught_by

    denoiser = read(folder).denoiser(None)  # on the meta device, with its conversions
    channels = anatomy.of(denoiser).channels
    reads_image = channels > config_of(folder, "vae/config.json").get("latent_channels", channels)
    job, _ = taught_by(stack_of(denoiser), reads_image, task)
    checked(job, words, image, mask)


def _opened(path: Path, ground: str = "white") -> Any:
    """A picture from a file; `ground` shows through where it is transparent.

    Raises:
        InputError: there is no such file, or it's no picture.
    """
    from pared.worlds.readers.items import Unusable, decode

    try:
        return decode(path, ground)
    except Unusable as fault:
        raise InputError(f"{path} can't be used: {fault}; give a picture file.") from None
