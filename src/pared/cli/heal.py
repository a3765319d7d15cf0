"""`pared heal`: train a converted model against the one it came from.

Denoisers train in float32, whatever type their weights came in, and are written back in that type.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pared.cli import common
from pared.cli.models import ModelName, Source, locate
from pared.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from pared.training import Dataset

EMOJI = "emoji"


@click.command()
@click.argument("student", type=ModelName())
@click.option(
    "--teacher", metavar="MODEL", type=ModelName(), required=True, help="What it came from."
)
@click.option(
    "--data",
    "source",
    metavar="SOURCE",
    default=EMOJI,
    show_default=True,
    help="Captioned images: emoji, a folder, .tar shards, a parquet file or a dataset.",
)
@click.option("--steps", type=click.IntRange(1), help="Training steps; 1000 by default.")
@click.option("--batch-size", type=click.IntRange(1), help="Pictures per step; 64 by default.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    help="Of AdamW; by default the method's, mostly 1e-4.",
)
@click.option("--seed", type=click.IntRange(0), help="Of order and noise; 0 by default.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
@click.pass_context
def command(
    ctx: click.Context, /, student: str, teacher: str, source: str, output: Path, **changes: Any
) -> None:
    """Train a converted model against the one it came from.

    STUDENT is a folder written by `pared convert`. It learns to paint what its teacher paints, with
    the losses of its method's paper; only what the method put in new is trained. The log and the
    newest checkpoint lie beside the output, in OUTPUT.training. Ctrl-C stops after the current
    step; the same command goes on from there, to the same weights.

    \b
    Examples:
      pared heal student --teacher house:pixart --steps 600 -o healed
      pared heal student --teacher house:pixart --data photos/ --batch-size 16 -o healed
    """
    student_source, teacher_source = locate(student), locate(teacher)
    _require_converted(student_source)
    teacher_source.require_pipeline("making the training data")
    common.check_writable(output)
    from pared import checkpoint
    from pared.healing import heal, task_of
    from pared.training.processes import saved_once, to_accelerator

    checkpoint.check_replaceable(output)
    items = items_of(source)
    target = student_source.load()
    _require_one_task(target, student)
    pipeline = to_accelerator(teacher_source.load())
    changes = {name: value for name, value in changes.items() if value is not None}
    state = output.with_name(f"{output.name}.training")
    data = latents_for(pipeline, items)
    run = heal(target, pipeline, data, state, task=task_of(pipeline), **changes)
    if not run.finished:
        common.stopped(ctx)
    saved_once(output, lambda place: checkpoint.save(target, place))
    click.echo(f"healed in {run.steps} steps: {output}")
    click.echo(f"log and last checkpoint: {state}")


def _require_one_task(target: Any, name: str) -> None:
    """Refuse a model of several tasks: captioned pictures would teach it one of them."""
    from pared.method import denoiser, stack_of

    for method in stack_of(denoiser(target)):
        if len(tasks := getattr(method, "tasks", ())) > 1:
            raise InputError(
                f"{name} does {', '.join(tasks)}, of which captioned images teach one; train it by "
                "a recipe with data of kind tasks, as in recipes/multi-task-upcycling/mini.toml."
            )


def _require_converted(source: Source) -> None:
    """Refuse, before anything is loaded, a model that no method has changed."""
    from_pared = source.kind == "folder" and (Path(source.place) / "pared.json").exists()
    if source.kind != "hub" and not from_pared:
        raise InputError(
            f"{source.name} carries no conversion, so there is nothing to heal; "
            "make a student first: `pared convert MODEL --with METHOD -o FOLDER`."
        )


def items_of(source: str) -> Any:
    """The user's captioned images, all checked; None for the emoji world."""
    if source == EMOJI:
        return None
    from pared.worlds.readers import read

    return read(source)


def latents_for(pipeline: Any, items: Any, split: str = "train") -> Dataset:
    """Captioned images as the pipeline's own latents and text embeddings.

    Args:
        pipeline: with an autoencoder and a text encoder.
        items: `pared.worlds.readers.Items` or a list of them; None for the emoji world.
        split: of the emoji world.

    Raises:
        InputError: the denoiser takes no prompts.
    """
    from pared import anatomy
    from pared.method import denoiser
    from pared.worlds import datasets

    family = anatomy.of(denoiser(pipeline))
    images, captions = _pictures(items, family.sample_size * pipeline.vae_scale_factor, split)
    return datasets.latents_of(pipeline, images, captions)


def _pictures(items: Any, size: int, split: str) -> tuple[Tensor, list[str]]:
    """Pictures, uint8 (count, 3, size, size), cropped to the middle square, and their captions."""
    from pared.worlds import datasets, emoji

    if items is None:
        world = emoji.load(split=split, size=size)
        return cast("Tensor", world.images), world.captions
    return datasets.fitted(items, size), [item.caption for item in items]
