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
@click.option("--fill", is_flag=True, help="Fill what the mask marks with WHAT; the model sees it "
              "blank, as those do that were taught by masks.")  # fmt: skip
@given.painting_options
def command(model: str, picture: Path, what: str, **call: Any) -> None:
    """Take something out of a picture.

    MODEL is a pipeline that was taught to inpaint, by multi-task-upcycling. It finds what WHAT
    names by itself; with a mask, nothing outside the mask changes. One that was taught by pictures
    with masks fills in: WHAT is what shall be there.

    \b
    Examples:
      pared inpaint house:tasks desk.png "remove the red apple" -o without.png
      pared inpaint runs/tasks/model desk.png "remove the red apple" --mask m.png -o without.png
      pared inpaint runs/fill/model desk.png "a red apple" --mask m.png --fill -o with.png
    """
    given.repaint("inpaint", model, picture, what, **call)
