"""`pared bill`: where a model's cost goes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from pared.cli import common
from pared.cli.models import ModelName, locate

if TYPE_CHECKING:
    from pared.bench.bill import Bill


@click.command()
@click.argument("model", type=ModelName())
@common.with_option("conversion")
@click.option("--height", type=click.IntRange(1), help="In pixels; by default the model's own.")
@click.option("--width", type=click.IntRange(1), help="In pixels; by default the model's own.")
@click.option("--frames", type=click.IntRange(1), help="Of a video; by default the pipeline's.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps; by default the pipeline's.")
@click.option("--passes", type=click.IntRange(1), help="Per step; 2 with classifier-free guidance.")
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Pictures at once."
)
@click.option(
    "--tasks",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="That the product does; each takes a denoiser, unless one was taught many.",
)
@click.option("--savings", "with_savings", is_flag=True, help="Add what each method would change.")
@common.json_option
def command(
    model: str, specs: tuple[str, ...], with_savings: bool, as_json: bool, **size: Any
) -> None:
    """Show where a model's cost goes.

    The bill of a picture is steps x passes x what one pass computes, and the text encoders and the
    decoder. It's counted from the model's configuration: no weights are loaded, downloaded or
    computed with. With --with a second bill shows the model rebuilt by those methods.

    \b
    Examples:
      pared bill sd3.5-medium
      pared bill pixart-sigma --height 2048 --width 2048 --with edit
      pared bill toy:dit --savings
      pared bill wan2.1-t2v-1.3b --frames 41
      pared bill sd1.5 --passes 3 --tasks 4 --with linfusion --with multi-task-upcycling \\
        --with explicit-conditioning
    """
    common.records_of(specs, "conversion")
    target = locate(model).without_weights()
    methods = common.conversions_of(specs)
    from pared.bench.bill import Order
    from pared.bench.targets import read
    from pared.method import convert

    found = read(target)
    order = Order(found, **size, text_tokens=None, dtype=None)
    bills = [order.bill(found.denoiser(None))]
    if methods:
        bills.append(order.bill(convert(found.denoiser(None), *methods)))
    savings = None
    if with_savings:
        from pared.bench.savings import savings as savings_of

        size.pop("tasks")
        savings = savings_of(target, **size)
    if as_json:
        content = bills[0].to_dict()
        content |= {"with": list(specs), "rebuilt": bills[1].to_dict()} if methods else {}
        content |= json.loads(savings.table("json")) if savings is not None else {}
        common.print_json(content)
        return
    click.echo(bills[0].table())
    if methods:
        click.echo(f"\nWith {' and '.join(specs)}, {_fewer(*bills)}:\n")
        click.echo(bills[1].table())
    if savings is not None:
        click.echo(f"\n{savings.table()}")


def _fewer(before: Bill, after: Bill) -> str:
    """What a rebuilt model saves, in words."""
    said = f"{before.per_image / after.per_image:.2f}x fewer MACs per image"
    if before.models == 1:
        return said
    return f"{said} and {before.kept_parameters / after.kept_parameters:.2f}x fewer parameters"
