"""`pared transcribe`: write down what recordings say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pared.cli import common
from pared.cli.models import locate

if TYPE_CHECKING:
    from torch import Tensor

    from pared.speech.recognition import Recogniser, Word

MODEL = "house:conformer"


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--model",
    metavar="MODEL",
    default=MODEL,
    show_default=True,
    help="A CTC model of transformers: a house model, a folder or a hub id.",
)
@click.option(
    "--beam", type=click.IntRange(1), default=1, show_default=True,
    help="Prefixes that decoding keeps; 1 takes the best letter of each frame.",
)  # fmt: skip
@common.device_option
@common.json_option
def command(
    files: tuple[str, ...], model: str, beam: int, device: str | None, as_json: bool
) -> None:
    """Write down what recordings say.

    FILE is a recording of any length: WAV, FLAC, OGG or MP3. Words are written as they are
    recognised; with --json at the end, with the seconds at which each begins and ends.

    \b
    Examples:
      pared transcribe talk.flac
      pared transcribe monday.wav tuesday.wav --model my-recogniser --json
      pared transcribe talk.flac --model facebook/wav2vec2-base-960h
    """
    found = locate(model)
    from pared.worlds.speech import audio

    # Every recording is read once before the model is loaded, or downloaded: what can't be used is
    # refused first.
    for name in files:
        audio.check(name)
    place = common.device_of(device)
    from transformers.utils import logging

    from pared.speech.recognition import load

    logging.disable_progress_bar()  # of weights already here: it would stand among the words
    recogniser = load(found.model_folder(), place)
    told = [_one(recogniser, name, beam, len(files) > 1, as_json) for name in files]
    if as_json:
        common.print_json(told)


def _one(recogniser: Recogniser, name: str, beam: int, named: bool, quiet: bool) -> dict[str, Any]:
    """One recording, written down as it goes on unless `quiet`; and what JSON tells of it."""
    from pared.speech.recognition import transcribe
    from pared.worlds.speech import audio

    begun, heard = time.perf_counter(), _Counted(audio.read_blocks(name, recogniser.rate))
    words: list[Word] = []
    for word in transcribe(recogniser, heard, beam):
        if not quiet:
            lead = " " if words else f"{name}: " if named else ""
            click.echo(f"{lead}{word.text}", nl=False)
        words.append(word)
    if not quiet:
        click.echo("" if words or not named else f"{name}:")
    seconds = heard.samples / recogniser.rate
    return {
        "file": name,
        "text": " ".join(word.text for word in words),
        "seconds": round(seconds, 3),
        "real_time_factor": round((time.perf_counter() - begun) / seconds, 4),
        "words": [asdict(word) for word in words],
    }


class _Counted:
    """Passes pieces of sound on and counts their samples."""

    def __init__(self, pieces: Iterator[Tensor]) -> None:
        self.pieces, self.samples = pieces, 0

    def __iter__(self) -> Iterator[Tensor]:
        for piece in self.pieces:
            self.samples += len(piece)
            yield piece
