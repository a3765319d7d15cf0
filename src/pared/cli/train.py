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
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change an entry of the recipe, e.g. stages.0.training.steps=10; repeat for several.",
)
@click.pass_context
def command(
    ctx: click.Context, recipe: Path, output: Path | None, changes: tuple[str, ...]
) -> None:
    """Train what a recipe describes.

    A recipe is a TOML file: the model and its configuration, the data, the objective and one or
    more stages. The log, the newest checkpoint of each stage and at last the folder `model` are
    written to the output. Ctrl-C stops after the current step; the same command goes on from there,
    to the same weights.

    \b
    Examples:
      pared train recipes/house/pixart.toml
      pared train recipes/edit/paper.toml --set data.source=photos/ --set stages.0.training.steps=10
      accelerate launch -m pared train recipes/house/pixart.toml -o runs/pixart
    """
    from pared import recipe as recipes

    plan = recipes.read(recipe, changes)
    folder = output or Path("runs") / plan.name
    common.check_writable(folder)
    if folder.is_file():
        raise InputError(f"{folder} is a file; give the name of a folder.")
    recipes.check(plan)
    methods = " and ".join(plan.model.methods)
    what = f"{plan.model.class_ or plan.model.from_}{' with ' * bool(methods)}{methods}"
    size = f"{_number(recipes.steps_of(plan), 'step')} in {_number(len(plan.stages), 'stage')}"
    click.echo(f"{plan.name}: {what}, {size}, to {folder}")
    if recipes.run(plan, folder) is None:
        common.stopped(ctx)
    click.echo(f"trained: {folder / 'model'}")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"
