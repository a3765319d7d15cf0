"""`pared layers`: which layers of a model a conversion may have, and what each costs in quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pared.cli import common
from pared.cli.heal import EMOJI, items_of, latents_for
from pared.cli.models import ModelName, locate
from pared.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pared.layerwise import Curve


@click.command()
@click.argument("model", type=ModelName())
@click.option(
    "--with", "spec", required=True, metavar="SPEC", type=common.MethodName("conversion"),
    help="A conversion of attentions, e.g. edit or edit:r=8.",
)  # fmt: skip
@click.option(
    "--data",
    "source",
    metavar="SOURCE",
    default=EMOJI,
    show_default=True,
    help="Captioned images, as for `pared heal`; some are kept aside to measure on.",
)
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Of healing.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Pictures a step."
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Of AdamW.",
)
@click.option(
    "--count", type=click.IntRange(1), default=64, show_default=True, help="Pictures to measure on."
)
@click.option(
    "--size", type=click.IntRange(8), help="Side in pixels at which cost is counted; the model's."
)
@click.option(
    "--error",
    type=click.FloatRange(0),
    help="Also save the cheapest model within this error, to OUTPUT/model.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
@common.json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    spec: str,
    source: str,
    output: Path,
    count: int,
    size: int | None,
    error: float | None,
    as_json: bool,
    **training: Any,
) -> None:
    """Find the layers that a model misses least.

    Every attention is converted and healed by itself, all in one run. Then the layers are converted
    in the order in which the prediction misses them least, and error and multiply-adds are
    measured after each: a curve of quality against cost. Each row ends with the method as
    `pared convert --with` takes it. Curve and training lie in OUTPUT; Ctrl-C stops after the
    current step, and the same command goes on.

    \b
    Examples:
      pared layers house:pixart --with edit -o layers
      pared layers house:pixart --with edit:r=8 --size 1024 --error 0.02 -o layers
    """
    common.records_of([spec], "conversion")
    place = locate(model)
    place.require_pipeline("making the training data")
    common.check_writable(output)
    from pared import checkpoint, layerwise
    from pared.bench.bill import bill
    from pared.healing import task_of
    from pared.method import denoiser, replace_denoiser
    from pared.training.precision import in_float32, retype, types_of
    from pared.training.processes import to_accelerator

    (method,) = common.conversions_of([spec])
    if "layers" not in type(method).model_fields:
        raise InputError(
            f"{method.info.slug} has no setting layers, so there is nothing to choose."
        )
    items = items_of(source)
    training_items, measuring_items = _parted(items, count)
    pipeline = to_accelerator(place.load())
    teacher, task = denoiser(pipeline), task_of(pipeline)
    types, usual = types_of(teacher), cast("torch.dtype", teacher.dtype)
    data = latents_for(pipeline, training_items)
    aside = latents_for(pipeline, measuring_items, split="heldout")
    with in_float32(teacher):
        healed = layerwise.heal_layers(teacher, method, data, output / "training", task, **training)
        if healed is None:
            common.stopped(ctx)

        def multiply_adds(denoising: nn.Module) -> float:
            replace_denoiser(pipeline, denoising)
            return bill(pipeline, height=size, width=size).per_pass

        curve = layerwise.search(teacher, healed, method, aside, task, multiply_adds, count)
        (output / "curve.json").write_text(curve.to_json() + "\n")
        if error is not None:
            chosen = curve.within(error)
            found = layerwise.assemble(teacher, healed, method, chosen.layers)
            retype(found, types, usual)
            replace_denoiser(pipeline, found)
            checkpoint.save(pipeline, output / "model")
    if as_json:
        common.print_json(curve.to_dict())
    else:
        _show(curve)


def _parted(items: Any, count: int) -> tuple[Any, Any]:
    """What trains and what is kept aside; the emoji world has splits of its own."""
    if items is None:
        return None, None
    found = list(items)
    if len(found) <= count:
        raise InputError(
            f"the data has {len(found)} pictures and {count} are to be measured on; give more "
            "pictures or a smaller --count."
        )
    return found[count:], found[:count]


def _show(curve: Curve) -> None:
    base = curve.choices[0].cost
    rows = [
        (
            str(len(choice.layers)),
            f"{choice.error:.4f}",
            f"{choice.cost / 1e9:,.2f}",
            f"{choice.cost / base - 1:+.1%}",
            choice.spec or "(the model as it is)",
        )
        for choice in curve.choices
    ]
    common.print_table(("layers", "error", "GMACs a pass", "", "--with"), rows)
