"""`pared bench`: gain and loss of several ways to run one model, side by side."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pared import info
from pared.cli import common
from pared.cli.models import ModelName, locate
from pared.errors import InputError

if TYPE_CHECKING:
    from pared.bench.report import Report


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
def command(
    model: str,
    stacks: tuple[str, ...],
    rivals: tuple[str, ...],
    frontier: bool,
    slugs: tuple[str, ...],
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
    steps at the same cost. A preset is timed on random weights. Conversions given by --with are not
    healed: give healed students by --against.

    \b
    Examples:
      pared bench house:pixart --against house:pixart-edit --prompt "red heart" --html page.html
      pared bench pixart-sigma --with edit --with edit:r=8 --height 1024 --width 1024
      pared bench house:pixart --frontier --seeds 2 --html frontier.html
    """
    if not stacks and not rivals and not frontier:
        raise InputError(
            "there is nothing to compare; give an arm by --with METHOD or --against MODEL, or all "
            "that run-time methods offer by --frontier."
        )
    if slugs and not frontier:
        raise InputError("--method chooses among the arms of --frontier; give both, or --with.")
    for path in (html, output):
        if path is not None:
            common.check_writable(path)
    for stack in stacks:
        for spec in stack.split("+"):
            info.get(spec.partition(":")[0].strip())
    source = locate(model)
    common.records_of(slugs, "runtime")
    if frontier:
        source.require_pipeline("a frontier")
    others = {name: locate(name) for name in rivals}

    from pared.bench.run import bench
    from pared.method import parse

    arms: dict[str, Any] = {"base": []}
    arms |= {stack: [parse(spec) for spec in stack.split("+")] for stack in stacks}
    arms |= {name: other.load() for name, other in others.items()}
    base = model if source.kind == "preset" else source.load()
    if frontier:
        arms |= _frontier(base, slugs)
    report = bench(base, arms, prompts=prompts or None, quality=not speed_only, **options)
    if html is not None:
        report.html(html)
    if output is not None:
        report.save_json(output)
    click.echo(json.dumps(report.to_dict(), indent=1) if as_json else report.table())
    if frontier and not as_json and not speed_only:
        click.echo("\nNothing here is both faster and nearer to the base than these:")
        for command_line in _best(report, model):
            click.echo(f"  {command_line}")


def _frontier(pipeline: Any, slugs: tuple[str, ...]) -> dict[str, Any]:
    """An arm for every point of the grid, by its spec."""
    from pared.bench import grid

    specs = grid.settings(grid.family_of(pipeline), slugs)
    stacks = grid.attachable(pipeline, specs)
    if not stacks:
        raise InputError("no run-time method can be attached to this model; give arms by --with.")
    return {"+".join(stack): list(grid.methods_of(stack)) for stack in stacks}


def _best(report: Report, model: str) -> list[str]:
    """Commands that paint as the arms of the Pareto set do, the fastest first."""
    from pared.bench.graphs import pareto

    rows = [row for row in report.rows if "psnr" in row.figures and "seconds" in row.figures]
    points = [(row.figures["seconds"].value, row.figures["psnr"].value) for row in rows]
    best = sorted(pareto(points, higher=True), key=lambda number: points[number])
    found = []
    for row in (rows[number] for number in best):
        words = ["pared", "sample", model, "PROMPT"]
        words += [word for spec in row.stack for word in ("--with", spec)]
        words += ["--steps", str(row.steps), "-o", "picture.png"]
        found.append(shlex.join(words))
    return found
