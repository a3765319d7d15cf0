"""`pared sample`: paint pictures from prompts."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from pared.cli import common
from pared.cli.models import ModelName, locate
from pared.errors import InputError

# Sample sizes for which PixArt pipelines have a table of aspect ratios; they refuse all others.
BINNED = (32, 64, 128, 256)


@click.command()
@click.argument("model", type=ModelName())
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@common.with_option("runtime")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps; by default the pipeline's.")
@click.option(
    "--guidance", type=click.FloatRange(0), help="Guidance scale; by default the pipeline's."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise.")
@click.option("--height", type=click.IntRange(8), help="In pixels; by default the model's own.")
@click.option("--width", type=click.IntRange(8), help="In pixels; by default the model's own.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder or .png file to write.",
)
@common.device_option
@common.dtype_option
def command(
    model: str,
    prompts: tuple[str, ...],
    specs: tuple[str, ...],
    output: Path,
    device: str | None,
    dtype: str | None,
    **call: Any,
) -> None:
    """Paint pictures from prompts.

    Works with any text-to-image pipeline of diffusers. Every prompt starts from the same noise, so
    a picture depends on its own prompt and the seed alone, and pictures of different models or
    methods can be compared. Several prompts give one file each and a sheet of all.

    \b
    Examples:
      pared sample house:pixart "red apple" -o apple.png
      pared sample house:pixart "red apple" "woman firefighter" --steps 20 --seed 3 -o pictures
    """
    common.records_of(specs, "runtime")
    source = locate(model)
    source.require_pipeline("painting")
    _check_output(output, len(prompts))
    where = common.device_of(device)
    methods = common.methods_of(specs, "runtime")
    pipeline = source.load(common.dtype_of(dtype), where)
    seed = call.pop("seed")
    arguments = _arguments(pipeline, model, call)

    import torch

    from pared.cli import pictures
    from pared.method import apply

    images = []
    # Without methods any pipeline will do, also one that pared can't read.
    with apply(pipeline, *methods) if methods else nullcontext():
        for prompt in prompts:
            noise = torch.Generator().manual_seed(seed)
            images += pipeline(prompt=prompt, generator=noise, **arguments).images
    if output.suffix == ".png":
        click.echo(pictures.save(images[0], output))
        return
    for name, image in zip(pictures.file_names(prompts), images, strict=True):
        click.echo(pictures.save(image, output / name))
    if len(images) > 1:
        click.echo(pictures.save(pictures.sheet(images), output / pictures.SHEET))


def _check_output(output: Path, count: int) -> None:
    if output.suffix == ".png":
        if count > 1:
            raise InputError(
                f"{output} is one picture, but there are {count} prompts; give a folder."
            )
        if output.is_dir():
            raise InputError(
                f"{output} is a folder; give the name of a file, or of a folder without .png."
            )
    elif output.is_file():
        raise InputError(f"{output} is a file that isn't named .png; give a folder or a .png file.")
    common.check_writable(output)


def _arguments(pipeline: Any, model: str, call: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments under the pipeline's names.

    Raises:
        InputError: the pipeline takes no prompt or not one of the options, or a size doesn't divide.
    """
    from pared.method import denoiser

    takes = inspect.signature(pipeline.__call__).parameters
    kind = type(pipeline).__name__
    if "prompt" not in takes:
        raise InputError(
            f"{model} is a {kind}, which takes no prompt; give a text-to-image pipeline."
        )
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    given = {option: value for option, value in call.items() if value is not None}
    for option in given:
        if names.get(option, option) not in takes:
            raise InputError(f"{model} is a {kind}, which takes no --{option}; leave it out.")
    config = denoiser(pipeline).config
    unit = getattr(pipeline, "vae_scale_factor", 8) * (config.get("patch_size") or 1)
    for option in ("height", "width"):
        if given.get(option, 0) % unit:
            raise InputError(
                f"--{option} {given[option]} doesn't work with {model}; give a multiple of {unit}."
            )
    arguments = {names.get(option, option): value for option, value in given.items()}
    if "use_resolution_binning" in takes and config.get("sample_size") not in BINNED:
        arguments["use_resolution_binning"] = False
    return arguments
