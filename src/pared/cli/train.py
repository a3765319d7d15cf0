"""`pared train`: train what a recipe describes."""

from pathlib import Path

import click

from pared.cli import common
from pared.errors import InputError


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write; by default runs/NAME."
)
@click.pass_context
def command(ctx: click.Context, recipe: Path, output: Path | None) -> None:
    """Train what a recipe describes.

    A recipe is a TOML file: the model and its configuration, the data, the objective and one or
    more stages. The log, the newest checkpoint of each stage and at last the folder `model` are
    written to the output. Ctrl-C stops after the current step; the same command goes on from there,
    to the same weights.

    \b
    Examples:
      pared train recipes/house/pixart.toml
      accelerate launch -m pared train recipes/house/pixart.toml -o runs/pixart
    """
    from pared import recipe as recipes

    plan = recipes.read(recipe)
    folder = output or Path("runs") / plan.name
    common.check_writable(folder)
    if folder.is_file():
        raise InputError(f"{folder} is a file; give the name of a folder.")
    recipes.check(plan)
    steps = sum(stage.training.steps for stage in plan.stages)
    stages = f"{len(plan.stages)} stages" if len(plan.stages) > 1 else "1 stage"
    click.echo(f"{plan.name}: {plan.model.class_}, {steps} steps in {stages}, to {folder}")
    if recipes.run(plan, folder) is None:
        common.stopped(ctx, "train", [str(recipe)], {"-o": folder})
    click.echo(f"trained: {folder / 'model'}")
