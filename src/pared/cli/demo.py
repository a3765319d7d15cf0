"""`pared demo`: what pared does, on the house models, in a few minutes without a network."""

import time
from pathlib import Path

import click

from pared.cli import common


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("pared-demo"),
    show_default=True,
    help="Folder to write.",
)
@click.option(
    "--heal-steps",
    type=click.IntRange(0),
    default=24,
    show_default=True,
    help="Steps of the live healing; 0 leaves it out.",
)
@click.option(
    "--quick", is_flag=True, help="Leave out the timing of full-size blocks, the longest part."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the healing."
)
def command(output: Path, heal_steps: int, quick: bool, seed: int) -> None:
    """See it all on the house models, offline.

    A text-to-image transformer and its linear-time EDiT version paint the same prompts from the
    same noise; both are timed in turn and billed; a fresh conversion is healed for a moment; and a
    full-size block is timed at growing picture sizes, to show where linear attention pays. Writes
    one page, report.html, with all of it.

    \b
    Examples:
      pared demo
      pared demo --quick -o /tmp/demo
    """
    common.check_writable(output)
    started = time.monotonic()
    from pared.bench.demo import SIZES, Settings, demonstrate

    settings = Settings(heal_steps=heal_steps, sizes=() if quick else SIZES, seed=seed)
    report, page = demonstrate(output, settings, say=lambda text: click.echo(text, err=True))
    click.echo()
    click.echo(report.table())
    click.echo()
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    click.echo(f"Done in {minutes} min {seconds:02d} s. Open {page} in a browser.")
