"""`pared enrol`: let an enhancer know whose voice to keep."""

from pathlib import Path

import click

from pared.cli import common, sound
from pared.errors import InputError

# Seconds that a microphone listens, where nothing is said.
LISTEN = 8.0


@click.command()
@click.argument("recording")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True,
    help="File to write (.safetensors).",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(1),
    help=f"How long a microphone listens; {LISTEN:g} by default.",
)  # fmt: skip
@sound.model_option
def command(recording: str, output: Path, seconds: float | None, model: str) -> None:
    """Tell an enhancer whose voice to keep.

    RECORDING is an audio file of that voice alone, - for a pipe of 16-bit mono samples at 16 kHz,
    or mic for the microphone. 3 to 10 seconds of speech are best. The file that is written goes
    with the model that made it.

    \b
    Examples:
      pared enrol me.wav -o me.safetensors
      pared enrol mic --seconds 10 -o me.safetensors
    """
    if output.suffix != ".safetensors":
        raise InputError(f"{output} isn't named .safetensors; give the name of such a file.")
    if seconds is not None and recording != sound.MICROPHONE:
        raise InputError("--seconds is for the microphone; leave it out, or give mic.")
    common.check_writable(output)
    heard = list(sound.pieces(recording, seconds or LISTEN))
    enhancer = sound.enhancer_of(model)
    import torch

    from pared.speech.streaming_pse import enrolment

    whole = torch.cat(heard)
    enrolment.save(output, enhancer, enrolment.enrol(enhancer, whole))
    click.echo(f"{output}: a voice from {len(whole) / sound.RATE:.1f} s of recording")
