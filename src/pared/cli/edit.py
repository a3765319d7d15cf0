"""`pared edit`: change a picture by an instruction."""

from pathlib import Path
from typing import Any

import click

from pared.cli import given
from pared.cli.models import ModelName


@click.command()
@click.argument("model", type=ModelName())
@click.argument("picture", type=given.PICTURE)
@click.argument("instruction")
@given.painting_options
def command(model: str, picture: Path, instruction: str, **call: Any) -> None:
    """Change a picture by an instruction.

    MODEL is a pipeline that was taught to edit, by multi-task-upcycling or explicit-conditioning.
    The result depends on the picture, the instruction and the seed alone.

    \b
    Examples:
      pared edit house:tasks apple.png "make it green" -o green.png
      pared edit runs/tasks/model me.png "turn the man into a woman" --guidance 3 -o her.png
    """
    given.repaint("edit", model, picture, instruction, **call)
