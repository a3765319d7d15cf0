"""`pared bill`: where a model's cost goes."""

from __future__ import annotations

import click

from pared.cli import common
from pared.cli.models import ModelName, locate


@click.command()
@click.argument("model", type=ModelName())
@common.with_option("conversion")
@click.option("--height", type=click.IntRange(1), help="In pixels; by default the model's own.")
@click.option("--width", type=click.IntRange(1), help="In pixels; by default the model's own.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps; by default the pipeline's.")
@click.option("--passes", type=click.IntRange(1), help="Per step; 2 with classifier-free guidance.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Pictures at once.")
@common.json_option
def command(model: str, specs: tuple[str, ...], as_json: bool, **size: int | None) -> None:
    """Show where a model's cost goes.

    The bill of a picture is steps x passes x what one pass computes, and the text encoders and the
    decoder. It's counted from the model's configuration: no weights are loaded, downloaded or
    computed with. With methods, a second table shows what each of them would save.

    \b
    Examples:
      pared bill sd3.5-medium
      pared bill pixart-sigma --height 2048 --width 2048 --with edit
    """
    common.records_of(specs, "conversion")
    target = locate(model).without_weights()
    methods = common.methods_of(specs, "conversion")
    from pared.bench.bill import bill

    found = bill(target, **size)
    if methods:
        from pared.bench.bill import savings
    click.echo(found.table("json" if as_json else "text"))
