"""`pared enhance`: keep one voice of a recording, while it is being recorded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from pared.cli import common, sound
from pared.errors import InputError


@click.command()
@click.argument("source")
@click.option(
    "-e", "--enrolment", "voice", type=click.Path(path_type=Path), required=True,
    help="Whose voice to keep: a file of `pared enrol`.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help=".wav file to write; by default a pipe."
)
@sound.model_option
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Of the processor."
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

    SOURCE is an audio file, - for a pipe of 16-bit mono samples at 16 kHz, or mic for the
    microphone. Without -o such samples are piped on, or those of the microphone played. At the end
    the standard error tells how long each hop of 16 ms took.

    \b
    Examples:
      pared enhance talk.flac -e me.safetensors -o talk.wav
      pared enhance - -e me.safetensors -o clean.wav
      pared enhance mic -e me.safetensors -o call.wav
    """
    _check(source, output, as_json)
    recording = sound.pieces(source)
    enhancer = sound.enhancer_of(model)
    import torch

    from pared.speech.streaming_pse import enrolment
    from pared.speech.streaming_pse.stream import Stream

    torch.set_num_threads(threads)
    known = enrolment.load(voice, enhancer)
    with sound.written(output, source) as write:
        stream = Stream(enhancer, known)
        finished = sound.enhance(stream, recording, write, sound.Meter(meter))
    report, latency = stream.latency.report(), enhancer.settings.latency
    if as_json:
        common.print_json(asdict(report) | {"latency": latency, "threads": threads})
    else:
        click.echo(sound.sentences(report, latency, threads), err=True)
    # A microphone has no other end than Ctrl-C.
    if not finished and source != sound.MICROPHONE:
        ctx.exit(130)


def _check(source: str, output: Path | None, as_json: bool) -> None:
    """Refuse what can be refused before a model is loaded."""
    if output is None:
        if as_json:
            raise InputError("--json prints where the sound would go; give -o FILE.wav too.")
        return
    if output.suffix != ".wav":
        raise InputError(f"{output} isn't named .wav; give the name of a .wav file.")
    if output.exists() and Path(source).exists() and output.samefile(source):
        raise InputError(f"{output} would be read and overwritten; give another name for it.")
    common.check_writable(output)
