"""`pared export`: write a model for other runtimes and devices."""

from __future__ import annotations

from pathlib import Path

import click

from pared.cli import common
from pared.cli.models import ModelName, Source, config_of, locate
from pared.errors import InputError

# What config.json says of the one kind of model that is exported.
EXPORTED = "streaming-pse"


@click.command()
@click.argument("model", type=ModelName())
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True,
    help="File to write (.onnx).",
)  # fmt: skip
def command(model: str, output: Path) -> None:
    """Write a model for other runtimes and devices.

    MODEL is an enhancer of `pared enhance`. The file holds what is done with one hop of sound, for
    onnxruntime and the like. It keeps nothing itself: whoever runs it gives chunk, the state and
    the enrolment, and takes enhanced and the state of the next hop, after.NAME for state.NAME. All
    of the first state is zero. The enrolment is the file of `pared enrol`, of whose key and value
    layer N is given as enrolment.key.N and enrolment.value.N.

    \b
    Examples:
      pared export house:streaming-pse -o enhancer.onnx
      pared export runs/voice/model -o enhancer.onnx
    """
    if output.suffix != ".onnx":
        raise InputError(f"{output} isn't named .onnx; give the name of such a file.")
    common.check_file(output, "enhancer.onnx")
    folder = _enhancer_in(locate(model))
    from pared.export.onnx import OnnxStep, export_step
    from pared.speech.streaming_pse.model import load

    enhancer = load(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    step = OnnxStep(export_step(enhancer, output))
    settings, size = enhancer.settings, output.stat().st_size / 2**20
    states = sum(name.startswith("state.") for name in step.inputs)
    click.echo(
        f"{output}: {size:.1f} MiB, {common.count(enhancer.num_parameters())} parameters, "
        f"{settings.hop} samples a hop, {1000 * settings.latency:.0f} ms behind the sound, "
        f"{states} tensors of state"
    )


def _enhancer_in(source: Source) -> Path:
    """The folder of an enhancer, downloaded where one of the hub isn't cached.

    Raises:
        InputError: it's something else, or the hub can't be reached or has no such model.
    """
    kind = "random weights"
    if source.kind != "preset":
        folder = source.model_folder()
        if (kind := _kind(folder)) == EXPORTED:
            return folder
    raise InputError(
        f"{source.name} ({kind}) can't be exported; only the streaming step of enhancers "
        f"({EXPORTED}) can, such as house:{EXPORTED} or what `pared train` makes of "
        f"recipes/{EXPORTED}."
    )


def _kind(folder: Path) -> str:
    """What a model is, by its own files."""
    for name, entry in (
        ("model_index.json", "_class_name"),
        ("config.json", "_class_name"),
        ("config.json", "model_type"),
    ):
        if told := config_of(folder, name).get(entry):
            return str(told)
    return "of an unknown kind"
