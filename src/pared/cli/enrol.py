"""`pared enrol`: let an enhancer know whose voice to keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pared.cli import sound
from pared.cli.sound_card import RATE, SoundCard
from pared.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Seconds that a microphone listens, where nothing is said.
LISTEN = 8.0


@click.command()
@click.argument("source")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=sound.VOICE, show_default=True,
    help="File to write (.safetensors).",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(1),
    help=f"How long a microphone listens; {LISTEN:g} by default.",
)  # fmt: skip
@sound.model_option
def command(source: str, output: Path, seconds: float | None, model: str) -> None:
    """Tell an enhancer whose voice to keep.

    SOURCE is an audio file of that voice alone, `-` for a pipe of 16-bit mono samples at 16 kHz, or
    `mic` for the microphone. 3 to 10 seconds of speech are best. What is written is of use to the
    model that made it, and to no other; `pared enhance` finds it in the same folder.

    \b
    Examples:
      pared enrol me.wav
      pared enhance noisy.wav
      pared enrol mic --seconds 10 -o me.safetensors
    """
    if seconds is not None and source != sound.MICROPHONE:
        raise InputError("--seconds is for the microphone; leave it out, or give mic.")
    sound.check_output(output, ".safetensors")
    card = SoundCard()
    recording = sound.pieces(source, card, seconds or LISTEN)
    # The model before the first sample: nobody is to speak in vain.
    enhancer = sound.enhancer_of(model)
    import torch

    from pared.speech.streaming_pse import enrolment

    enrolment.check_model(enhancer)
    heard = torch.cat(_first(recording, round(enrolment.LONGEST * RATE)))
    enrolled = enrolment.enrol(enhancer, heard)
    enrolment.save(output, enhancer, enrolled)
    what = "a voice" if enrolled else "no voice, as this model (conditioning=none) keeps them all,"
    lost = f", in which sound was lost {card.times_lost()}" if card.lost else ""
    click.echo(f"{output}: {what} from {len(heard) / RATE:.1f} s of recording{lost}")


def _first(pieces: Iterator[Tensor], samples: int) -> list[Tensor]:
    """The pieces up to so many samples; no more are taken."""
    taken: list[Tensor] = []
    for piece in pieces:
        taken.append(piece[:samples])
        samples -= len(taken[-1])
        if not samples:
            break
    return taken
