"""`pared upscale`: a sharper picture, four times as wide and high."""

from pathlib import Path
from typing import Any

import click

from pared.cli import given
from pared.cli.models import ModelName


@click.command()
@click.argument("model", type=ModelName())
@click.argument("picture", type=given.PICTURE)
@click.argument("prompt", default="")
@given.painting_options
def command(model: str, picture: Path, prompt: str, **call: Any) -> None:
    """Make a picture four times as wide and high, and sharp.

    MODEL is a pipeline that was taught to upscale, by multi-task-upcycling. A PROMPT that says what
    the picture shows may help, and may be left out.

    \b
    Examples:
      pared upscale house:tasks small.png -o large.png
      pared upscale runs/tasks/model small.png "red apple" --steps 10 -o large.png
    """
    given.repaint("upscale", model, picture, prompt, **call)
