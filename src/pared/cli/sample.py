"""`pared sample`: paint pictures from prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pared.cli import common
from pared.cli.models import ModelName, Source, config_of, locate
from pared.errors import InputError

if TYPE_CHECKING:
    from pared.bench.fit import Plan

# Sample sizes for which PixArt pipelines have a table of aspect ratios; they refuse all others.
BINNED = (32, 64, 128, 256)
# Of autoencoders whose configuration doesn't tell: 8 pixels per latent pixel.
USUAL_STAGES = (1, 1, 1, 1)
# What commands set of a pipeline's call.
OPTIONS = ("steps", "guidance", "height", "width")


@click.command()
@click.argument("model", type=ModelName())
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@common.with_option("runtime")
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="What `pared fit` found, with all it was measured with; --with adds to it, other options "
    "go before.",
)
@click.option("--steps", type=click.IntRange(1), help="Denoising steps; by default the pipeline's.")
@click.option(
    "--guidance", type=click.FloatRange(0), help="Guidance scale; by default the pipeline's."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise.")
@click.option("--height", type=click.IntRange(8), help="In pixels; by default the model's own.")
@click.option("--width", type=click.IntRange(8), help="In pixels; by default the model's own.")
@click.option(
    "--scale",
    "scales",
    type=click.FloatRange(1, min_open=True),
    multiple=True,
    help="Then refine at so many times the size; repeat, ascending, for several stages.",
)
@click.option(
    "--strength",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.7,
    show_default=True,
    help="How much noise refining begins with.",
)
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
    plan: Path | None,
    scales: tuple[float, ...],
    strength: float,
    output: Path,
    device: str | None,
    dtype: str | None,
    **call: Any,
) -> None:
    """Paint pictures from prompts.

    Works with any text-to-image pipeline of diffusers, and with those that paint classes: there a
    prompt is the number of one. Every prompt starts from the same noise, so a picture depends on
    its own prompt and the seed alone, and pictures of different models or methods can be compared.
    Several prompts give one file each and a sheet of all.

    \b
    Examples:
      pared sample house:pixart "red apple" -o apple.png
      pared sample house:pixart "red apple" "woman firefighter" --steps 20 --seed 3 -o pictures
      pared sample students/sdxl-linfusion "a fox" --scale 2 --scale 4 -o fox.png
    """
    source = locate(model)
    source.require_pipeline("painting")
    planned: dict[str, Any] = {}
    if plan is not None:
        found = _planned(plan, source)
        specs, dtype, planned = (*found.stack, *specs), dtype or found.dtype, found.call
        call["steps"] = call["steps"] or found.steps
    common.records_of(specs, "runtime")
    _check_output(output, len(prompts))
    where = common.device_of(device)
    methods = common.runtime_methods_of(specs)
    seed = call.pop("seed")
    arguments = planned | arguments_of(source.folder(), model, call)
    named = painted_by(source.folder(), model)
    kind = config_of(source.folder(), "model_index.json").get("_class_name")
    if "num_frames" in _call_of(kind, model):
        raise InputError(f"{model} is a {kind}, which makes videos; give a text-to-image pipeline.")
    if scales and named != "prompt":
        raise InputError(f"{model} paints classes, which can't be refined; leave --scale out.")
    wanted = [prompt if named == "prompt" else [_label(prompt, source)] for prompt in prompts]
    pipeline = source.load(common.dtype_of(dtype), where)

    import torch

    from pared.bench.subjects import require_null_class
    from pared.cli import pictures
    from pared.guidance.guidance_distillation import one_pass
    from pared.method import apply
    from pared.upscaling import coarse_to_fine

    require_null_class(pipeline, arguments)
    arguments = one_pass(pipeline, **arguments)
    images = []
    # Without methods any pipeline will do, also one that pared can't read.
    with apply(pipeline, *methods) if methods else nullcontext():
        for what in wanted:
            noise = torch.Generator().manual_seed(seed)
            call = {named: what, "generator": noise, **arguments}
            if scales:
                images += coarse_to_fine(pipeline, scales=scales, strength=strength, **call)
            else:
                images += pipeline(**call).images
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


def _planned(path: Path, source: Source) -> Plan:
    """A plan that was made for this model and its sampler.

    Raises:
        InputError: it wasn't, or there is none.
    """
    from pared.bench.fit import read_plan

    plan = read_plan(path)
    if plan.model != source.name and not _is_at(plan.model, source):
        raise InputError(
            f"{path} is a plan for {plan.model} and says nothing of {source.name}; make one by "
            "`pared fit`."
        )
    sampler = config_of(source.folder(), "model_index.json").get("scheduler", (None, None))[1]
    if plan.sampler != sampler:
        raise InputError(
            f"{path} is a plan for the sampler {plan.sampler}, and {source.name} has {sampler}; "
            "make one by `pared fit`."
        )
    return plan


def _is_at(name: str, source: Source) -> bool:
    """Whether another name means the same folder."""
    try:
        other = locate(name)
    except InputError:
        return False
    return other.kind == source.kind and Path(other.place).resolve() == Path(source.place).resolve()


def _label(prompt: str, source: Source) -> int:
    """The number of a class, which stands for a prompt where a pipeline takes classes.

    Raises:
        InputError: it is none.
    """
    count = classes_of(source.folder())
    if not prompt.isdecimal() or int(prompt) >= count:
        kind = config_of(source.folder(), "model_index.json").get("_class_name")
        raise InputError(
            f"{source.name} is a {kind}, which takes no prompt but classes, and {prompt!r} is none "
            f"of them; give a number from 0 to {count - 1}."
        )
    return int(prompt)


def classes_of(folder: Path) -> int:
    """How many classes a pipeline paints, the empty one left aside."""
    return int(config_of(folder, "transformer/config.json").get("num_embeds_ada_norm") or 1000)


def painted_by(folder: Path, model: str) -> str:
    """What a pipeline paints from: "prompt", or "class_labels".

    Raises:
        InputError: it takes neither.
    """
    kind = config_of(folder, "model_index.json").get("_class_name")
    takes = _call_of(kind, model)
    for name in ("prompt", "class_labels"):
        if name in takes:
            return name
    raise InputError(f"{model} is a {kind}, which takes no prompt; give a text-to-image pipeline.")


def arguments_of(folder: Path, model: str, call: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments under the pipeline's names, from its configuration alone.

    Raises:
        InputError: the pipeline takes no prompt or lacks an option, or a size doesn't divide.
    """
    painted_by(folder, model)
    kind = config_of(folder, "model_index.json").get("_class_name")
    takes = _call_of(kind, model)
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    given = {option: value for option, value in call.items() if value is not None}
    for option in given:
        if names.get(option, option) not in takes:
            raise InputError(f"{model} is a {kind}, which takes no --{option}; leave it out.")
    _, unit = pixels_of(folder)
    for side in ("height", "width"):
        if given.get(side, 0) % unit:
            raise InputError(
                f"--{side} {given[side]} doesn't work with {model}; give a multiple of {unit}."
            )
    arguments = {names.get(option, option): value for option, value in given.items()}
    size = config_of(folder, "transformer/config.json").get("sample_size")
    if "use_resolution_binning" in takes and size not in BINNED:
        arguments["use_resolution_binning"] = False
    if "clean_caption" in takes and find_spec("bs4") is None:
        # What the pipeline would do itself, with a warning for every prompt.
        arguments["clean_caption"] = False
    return arguments


def pixels_of(folder: Path) -> tuple[int, int]:
    """The side of a latent pixel and that of a token, in pixels."""
    stages = config_of(folder, "vae/config.json").get("block_out_channels", USUAL_STAGES)
    denoiser = config_of(folder, "transformer/config.json") | config_of(folder, "unet/config.json")
    # A number, or of videos time, height and width; FLUX's pipelines pack the tokens themselves.
    patch = denoiser.get("patch_size") or 1
    if str(denoiser.get("_class_name")).startswith("Flux"):
        patch = 2
    scale = 2 ** (len(stages) - 1)
    return scale, scale * (patch[-1] if isinstance(patch, list) else patch)


def _call_of(kind: Any, model: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call, by the name of its class."""
    import diffusers

    cls = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if cls is None:
        raise InputError(
            f"{model} is a {kind}, which diffusers doesn't have; give a pipeline of its own."
        )
    return inspect.signature(cls.__call__).parameters
