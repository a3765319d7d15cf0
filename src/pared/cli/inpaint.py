"""`pared inpaint`: take something out of a picture."""

from pathlib import Path
from typing import Any

import click

from pared.cli import given
from pared.cli.models import ModelName


@click.command()
@click.argument("model", type=ModelName())
@click.argument("picture", type=given.PICTURE)
@click.argument("what")
@click.option("--mask", type=given.PICTURE, help="White where the picture may change.")
@given.painting_options
def command(model: str, picture: Path, what: str, **call: Any) -> None:
    """Take something out of a picture.

    MODEL is a pipeline that was taught to inpaint, by multi-task-upcycling. It finds what WHAT
    names by itself; with a mask, nothing outside the mask changes.

    \b
    Examples:
      pared inpaint house:tasks desk.png "remove the red apple" -o without.png
      pared inpaint runs/tasks/model desk.png "remove the red apple" --mask m.png -o without.png
    """
    given.repaint("inpaint", model, picture, what, **call)
