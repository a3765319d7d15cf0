"""`pared route`: learn which layers of which sampling steps need computing."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pared.cli import common
from pared.cli.models import ModelName, locate
from pared.cli.sample import pixels_of
from pared.errors import InputError

if TYPE_CHECKING:
    from pared.caching.harmonica_training import Learned

# Captions of the emoji world that trajectories are drawn from, where no prompts are given.
CAPTIONS = 256


@click.command()
@click.argument("model", type=ModelName())
@click.option(
    "--steps",
    type=click.IntRange(2),
    default=20,
    show_default=True,
    help="Of the runs that it is for.",
)
@click.option(
    "--target-reuse",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of all outputs to reuse; 0.5 by default.",
)
@click.option(
    "--beta", type=click.FloatRange(0), help="Instead: the price of computing, as in the paper."
)
@click.option(
    "--guidance", type=click.FloatRange(0), help="Guidance scale; by default the pipeline's."
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="File with a prompt on each line; by default captions of the emoji world.",
)
@click.option("--size", type=click.IntRange(8), help="Side in pixels; by default the model's own.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Samples at once."
)
@click.option(
    "--updates",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Of single steps; the paper makes 20000, at a learning rate of 0.01.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    default=0.05,
    show_default=True,
    help="Of AdamW.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of noise and prompts."
)
@click.option(
    "-o",
    "--output",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Router to write (.safetensors).",
)
@common.json_option
@common.device_option
@common.dtype_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    guidance: float | None,
    prompts: Path | None,
    size: int | None,
    output: Path,
    as_json: bool,
    device: str | None,
    dtype: str | None,
    **training: Any,
) -> None:
    """Learn which layers of which sampling steps need computing.

    The others take their output of the step before: HarmoniCa (`pared methods harmonica`). Only a
    table of scores is learned, from noise and prompts, along the trajectories that reuse makes; the
    model stays as it is. The table holds for this model, sampler and number of steps. The log and
    the newest checkpoint lie beside the output, in OUTPUT.training. Ctrl-C stops after the current
    trajectory; the same command goes on from there, to the same table.

    \b
    Examples:
      pared route house:pixart --steps 20 --target-reuse 0.5 -o router.safetensors
      pared sample house:pixart "red heart" --steps 20 --with harmonica:router=router.safetensors
        -o heart.png
    """
    if training["beta"] is not None and training["target_reuse"] is not None:
        raise InputError("--beta and --target-reuse both settle what is reused; give one of them.")
    common.check_file(output, "router.safetensors")
    texts = _prompts(prompts)
    source = locate(model)
    source.require_pipeline("learning along its sampling")
    settings = {name: value for name, value in training.items() if value is not None}
    settings["size"] = _latents(source.folder(), model, size)
    where = common.device_of(device)

    from pared.caching.harmonica_tables import require_possible
    from pared.caching.harmonica_training import learn
    from pared.caching.trajectory import conditions_of

    if training["beta"] is None:
        settings.setdefault("target_reuse", 0.5)
        require_possible(settings["target_reuse"], settings["steps"])
    pipeline = source.load(common.dtype_of(dtype), where)
    settings["guidance"] = _guidance(pipeline) if guidance is None else guidance
    learned = learn(
        pipeline,
        conditions_of(pipeline, texts or _captions()),
        output.with_name(f"{output.name}.training"),
        model=model,
        **settings,
    )
    if not learned.run.finished:
        common.stopped(ctx)
    learned.routing.save(output)
    if as_json:
        common.print_json(_facts(learned, output))
    else:
        _show(learned, model, output)


def _prompts(path: Path | None) -> list[str]:
    """The lines of a file; none where there is no file to read.

    Raises:
        InputError: it can't be read, or is empty.
    """
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{path} can't be read ({reason}); give a text file.") from None
    if not (found := [line for line in lines if line]):
        raise InputError(f"{path} has no prompts; write one on each line.")
    return found


def _captions() -> list[str]:
    """Captions spread evenly over the emoji world."""
    from pared.worlds import emoji

    captions = emoji.load(split="train", size=None).captions
    return captions[:: max(1, len(captions) // CAPTIONS)]


def _guidance(pipeline: Any) -> float:
    """The scale of a stock call in which no other is given."""
    from pared import anatomy
    from pared.method import denoiser

    embedded = "guidance" in anatomy.of(denoiser(pipeline)).conditions
    call = inspect.signature(type(pipeline).__call__).parameters
    name = "true_cfg_scale" if "true_cfg_scale" in call and not embedded else "guidance_scale"
    return float(call[name].default)


def _latents(folder: Path, model: str, size: int | None) -> tuple[int, int] | None:
    """Height and width of the latents of a picture of `size` pixels; None: the model's own.

    Raises:
        InputError: it doesn't divide.
    """
    if size is None:
        return None
    scale, unit = pixels_of(folder)
    if size % unit:
        raise InputError(f"--size {size} doesn't work with {model}; give a multiple of {unit}.")
    return size // scale, size // scale


def _facts(learned: Learned, output: Path) -> dict[str, Any]:
    routing = learned.routing
    return {
        "router": str(output),
        "cur": routing.cur,
        "steps": len(routing.timesteps),
        "sites": len(routing.sites),
        "tau": routing.tau,
        "beta": routing.beta,
        "sampler": routing.sampler,
        "guidance": routing.guidance,
        "timesteps": list(routing.timesteps),
        "computed": routing.table.sum(dim=1).tolist(),
        "seconds": round(learned.run.seconds, 1),
    }


def _show(learned: Learned, model: str, output: Path) -> None:
    facts = _facts(learned, output)
    rows = [
        (str(step), f"{time:g}", f"{computed} of {facts['sites']}")
        for step, (time, computed) in enumerate(
            zip(facts["timesteps"], facts["computed"], strict=True)
        )
    ]
    common.print_table(("step", "timestep", "computed"), rows)
    click.echo(f"reused: {facts['cur']:.1%} of {facts['steps']} x {facts['sites']} outputs")
    click.echo(
        f"{output}: use it by: pared sample {model} PROMPT --steps {facts['steps']} "
        f"--with harmonica:router={output} -o picture.png"
    )
