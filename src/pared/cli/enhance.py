"""`pared enhance`: keep one voice of a recording, while it is being recorded."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import click

from pared.cli import common, sound
from pared.cli.meter import Meter
from pared.cli.sound_card import SoundCard
from pared.errors import InputError


@click.command()
@click.argument("source")
@click.option(
    "-e", "--enrolment", "voice", type=click.Path(path_type=Path), default=sound.VOICE,
    show_default=True, help="Whose voice to keep: a file of `pared enrol`.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help=".wav file to write, or `-` for a pipe; by default beside a file, and as it came in.",
)  # fmt: skip
@sound.model_option
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Processor threads."
)
@click.option("--meter/--no-meter", default=None, help="Show the levels; by default in a terminal.")
@common.json_option
@click.pass_context
def command(
    ctx: click.Context,
    source: str,
    voice: Path,
    output: Path | None,
    model: str,
    threads: int,
    meter: bool | None,
    as_json: bool,
) -> None:
    """Keep the enrolled voice of a recording.

    SOURCE is an audio file, `-` for a pipe of 16-bit mono samples at 16 kHz, or `mic` for the
    microphone. Without -o, noisy.wav becomes noisy-enhanced.wav beside it, a pipe is passed on as
    such samples, and so is the microphone, which is played where no pipe takes it. At the end the
    standard error tells how long the hops of 16 ms took, and what microphone and loudspeaker add.

    \b
    Examples:
      pared enrol me.wav
      pared enhance noisy.wav
      pared enhance talk.flac -e me.safetensors -o talk.wav
      pared enhance talk.flac -o - | aplay -f S16_LE -r 16000
      pared enhance mic -o call.wav
    """
    output = _place(source, output)
    _check(source, voice, output, as_json)
    card = SoundCard()
    recording = sound.pieces(source, card)
    enhancer = sound.enhancer_of(model)
    import torch

    from pared.speech.streaming_pse import enrolment
    from pared.speech.streaming_pse.stream import Stream

    torch.set_num_threads(threads)
    stream = Stream(enhancer, enrolment.load(voice, enhancer))
    with sound.written(output, source, card) as write:
        finished = sound.enhance(stream, recording, write, Meter(meter))
    report, latency = stream.latency.report(), enhancer.settings.latency
    if as_json:
        told = {"output": str(output), "latency": latency, "threads": threads}
        devices = {"device_latency": card.latency, "lost": card.lost}
        common.print_json(asdict(report) | told | devices)
    else:
        place = "" if output is None else f"{output}: "
        click.echo(place + sound.sentences(report, latency, threads, card), err=True)
    # A microphone has no other end than Ctrl-C.
    if not finished and source != sound.MICROPHONE:
        ctx.exit(130)


def _place(source: str, output: Path | None) -> Path | None:
    """The file that is written; None for a pipe, or for the loudspeaker."""
    if output is None and source not in (sound.PIPE, sound.MICROPHONE):
        beside = Path(os.path.expanduser(source))
        return beside.parent / f"{beside.stem}-enhanced.wav"
    if output is not None and str(output) != sound.PIPE:
        return output
    played = source == sound.MICROPHONE and output is None
    if sys.stdout.isatty() and not played:
        raise InputError("there is nowhere to write; give -o FILE.wav, or pipe the output on.")
    return None


def _check(source: str, voice: Path, output: Path | None, as_json: bool) -> None:
    """Refuse what can be refused before a model is loaded."""
    if output is not None:
        sound.check_output(output, ".wav")
        recording = os.path.expanduser(source)
        if output.exists() and os.path.exists(recording) and output.samefile(recording):
            raise InputError(f"{output} would be read and overwritten; give another name for it.")
    elif as_json:
        raise InputError("--json prints where the sound would go; give -o FILE.wav too.")
    if not os.path.isfile(voice):
        raise InputError(
            f"there is no enrolment {str(voice)!r}; run `pared enrol me.wav` first, or give "
            "another one with -e."
        )
