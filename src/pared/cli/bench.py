"""`pared bench`: gain and loss of several ways to run one model, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pared import info
from pared.cli import common
from pared.cli.models import ModelName, locate
from pared.cli.sample import OPTIONS, arguments_of
from pared.errors import InputError


@click.command()
@click.argument("model", type=ModelName())
@click.option(
    "--with",
    "stacks",
    metavar="SPEC[+SPEC]",
    multiple=True,
    help="An arm: a method, or several joined by +; repeat for more arms.",
)
@click.option(
    "--against",
    "rivals",
    metavar="MODEL",
    multiple=True,
    type=ModelName(),
    help="An arm that is a model of its own, e.g. a healed student; repeat for more.",
)
@click.option(
    "--frontier",
    is_flag=True,
    help="Add an arm for every setting in the grids of the run-time methods that serve the model.",
)
@click.option(
    "--method",
    "slugs",
    metavar="METHOD",
    multiple=True,
    type=common.MethodName("runtime"),
    help="With --frontier: of these methods only. Repeatable.",
)
@click.option(
    "--peers",
    is_flag=True,
    help="Add an arm for every cache of diffusers and cache-dit that works on the model.",
)
@click.option("--prompt", "prompts", multiple=True, help="What to paint; repeat for more.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps; by default the pipeline's.")
@click.option(
    "--guidance", type=click.FloatRange(0), help="Guidance scale; by default the pipeline's."
)
@click.option("--height", type=click.IntRange(1), help="In pixels; by default the model's own.")
@click.option("--width", type=click.IntRange(1), help="In pixels; by default the model's own.")
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Pictures per prompt, each with noise of its own.",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timings of each arm."
)
@click.option("--speed-only", is_flag=True, help="Measure time and cost, paint nothing.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page with pictures.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write figures (JSON).")
@common.json_option
@common.device_option
@common.dtype_option
def command(
    model: str,
    stacks: tuple[str, ...],
    rivals: tuple[str, ...],
    frontier: bool,
    slugs: tuple[str, ...],
    peers: bool,
    prompts: tuple[str, ...],
    speed_only: bool,
    html: Path | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure gain and loss side by side.

    Base and arms take turns, so that what disturbs the machine disturbs all of them alike; pictures
    are painted from the same noise. Arms with run-time methods get a rival: the base with fewer
    steps at the same cost. Each arm comes with the command that paints its first picture, and those
    are marked that nothing else here beats in both speed and closeness to the base. A preset is
    timed on random weights. Conversions given by --with are not healed: give healed students by
    --against.

    \b
    Examples:
      pared bench house:pixart --against house:pixart-edit --prompt "red heart" --html page.html
      pared bench pixart-sigma --with edit --with edit:r=8 --height 1024 --width 1024
      pared bench house:pixart --frontier --seeds 2 --html frontier.html
    """
    if not (stacks or rivals or frontier or peers):
        raise InputError(
            "there is nothing to compare; give an arm by --with METHOD or --against MODEL, or all "
            "that run-time methods offer by --frontier."
        )
    if slugs and not frontier:
        raise InputError("--method chooses among the arms of --frontier; give both, or --with.")
    for path, example in ((html, "page.html"), (output, "figures.json")):
        if path is not None:
            common.check_file(path, example)
    for stack in stacks:
        for spec in stack.split("+"):
            info.get(spec.partition(":")[0].strip())
    source = locate(model)
    if source.kind == "preset" and options["dtype"]:
        raise InputError(
            f"{model} has random weights, drawn in the type that suits the device; leave --dtype "
            "out."
        )
    common.records_of(slugs, "runtime")
    if frontier or peers:
        source.require_pipeline("a frontier" if frontier else "a cache of another library")
    others = {name: locate(name) for name in rivals}

    from pared.bench.run import bench
    from pared.method import parse

    arms: dict[str, Any] = {"base": []}
    arms |= {stack: [parse(spec) for spec in stack.split("+")] for stack in stacks}
    where, dtype = common.device_of(options["device"]), common.dtype_of(options["dtype"])
    if source.is_pipeline:  # what doesn't fit is refused before anything is loaded
        arguments_of(source.folder(), model, {name: options[name] for name in OPTIONS})
    arms |= {name: other.load(dtype, where) for name, other in others.items()}
    base = model if source.kind == "preset" else source.load(dtype, where)
    if frontier:
        arms |= _frontier(base, slugs)
    report = bench(
        base,
        arms,
        prompts=prompts or None,
        quality=not speed_only,
        peers=peers,
        models={"base": model} | {name: name for name in others},
        **options,
    )
    if html is not None:
        report.html(html)
    if output is not None:
        report.save_json(output)
    click.echo(json.dumps(report.to_dict(), indent=1) if as_json else report.table())


def _frontier(pipeline: Any, slugs: tuple[str, ...]) -> dict[str, Any]:
    """An arm for every point of the grid, by its spec."""
    from pared.bench import grid

    specs = grid.settings(grid.family_of(pipeline), slugs)
    stacks = grid.attachable(pipeline, specs)
    if not stacks:
        raise InputError("no run-time method can be attached to this model; give arms by --with.")
    return {"+".join(stack): list(grid.methods_of(stack)) for stack in stacks}
