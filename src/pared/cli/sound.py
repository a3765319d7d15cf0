"""Sound in and out of `pared enrol` and `pared enhance`, and the latter's report."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pared.cli import common
from pared.cli.ctrl_c import CtrlC
from pared.cli.meter import Meter
from pared.cli.models import locate
from pared.cli.sound_card import RATE, SoundCard
from pared.errors import InputError

if TYPE_CHECKING:
    from io import BufferedReader

    from torch import Tensor

    from pared.speech.streaming_pse.model import StreamingPSEModel
    from pared.speech.streaming_pse.stream import Report, Stream

MODEL = "house:streaming-pse"
# Where `pared enrol` writes and `pared enhance` looks, unless told otherwise.
VOICE = "voice.safetensors"
PIPE, MICROPHONE = "-", "mic"
# Samples that are taken from a file at a time.
PIECE = 4096
# The largest size that the header of a WAV file can tell.
LARGEST = 0xFFFFFFFF

model_option = click.option(
    "--model",
    metavar="MODEL",
    default=MODEL,
    show_default=True,
    help="The enhancer: a house model, a folder or a hub id.",
)


def enhancer_of(name: str) -> StreamingPSEModel:
    """The model behind a `--model`.

    Raises:
        InputError: there is none, or it's something else.
    """
    folder = locate(name).model_folder()
    from pared.speech.streaming_pse.model import load

    return load(folder)


def check_output(path: Path, suffix: str) -> None:
    """Refuse a file that can't be written, before any work.

    Raises:
        InputError: another suffix, a folder, or a place that can't be written.
    """
    if path.suffix != suffix:
        raise InputError(f"{path} isn't named {suffix}; give the name of a {suffix} file.")
    common.check_file(path, f"voice{suffix}")


# Sound in -------------------------------------------------------------------------------------


def pieces(source: str, card: SoundCard, seconds: float | None = None) -> Iterator[Tensor]:
    """A recording piece by piece, float (samples,) at 16 kHz, as it comes.

    Args:
        source: an audio file, "-" for a pipe of 16-bit samples, or "mic".
        card: whose microphone it is.
        seconds: when a microphone ends; by default never.

    Raises:
        InputError: there is nothing, or nothing that can be used.
    """
    if source == PIPE:
        if sys.stdin.isatty():
            raise InputError(
                "nothing is piped in; give 16-bit mono samples at 16 kHz, such as those of `sox "
                "talk.flac -t raw -r 16000 -b 16 -c 1 -`."
            )
        return _piped()
    if source == MICROPHONE:
        return map(_from_int16, card.record(seconds))
    from pared.worlds.speech import audio

    audio.check(source)
    return (piece for block in audio.read_blocks(source) for piece in block.split(PIECE))


def _piped() -> Iterator[Tensor]:
    rest, begun = b"", False
    stream = cast("BufferedReader", sys.stdin.buffer)
    while block := _block(stream):
        if not begun and block.startswith((b"RIFF", b"fLaC", b"OggS")):
            raise InputError(
                "the pipe carries a sound file; give its name instead, or pipe bare 16-bit mono "
                "samples at 16 kHz."
            )
        rest += block
        whole = len(rest) // 2 * 2
        if whole:
            begun = True
            yield _from_int16(rest[:whole])
        rest = rest[whole:]
    if not begun:
        raise InputError(
            "the pipe closed before a sample came; pipe 16-bit mono samples at 16 kHz."
        )


def _block(stream: BufferedReader) -> bytes:
    try:
        return stream.read1(1 << 16)
    except OSError as error:
        raise InputError(
            f"the pipe can't be read ({error.strerror}); pipe 16-bit mono samples at 16 kHz."
        ) from None


def _from_int16(block: bytes) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(block), dtype=torch.int16).float() / 32768


# Sound out ------------------------------------------------------------------------------------

Write = Callable[["Tensor"], object]


@contextmanager
def written(output: Path | None, source: str, card: SoundCard) -> Iterator[Write]:
    """What takes the enhanced samples: a WAV file, a pipe, or the loudspeaker.

    A file is whole after every piece, whatever happens next.

    Args:
        output: the file; None for a pipe, or in a terminal for the loudspeaker.
        source: as `pieces` takes it; only what comes from a microphone is played.
        card: whose loudspeaker it is.

    Raises:
        InputError: the place can't be written, at first or any further.
    """
    # Now, since an import takes longer than a microphone waits.
    from pared.worlds.speech.audio import to_int16

    def int16(samples: Tensor) -> bytes:
        return to_int16(samples).numpy().tobytes()

    if output is None and source == MICROPHONE and sys.stdout.isatty():
        with card.playing() as play:
            yield lambda samples: play(int16(samples))
        return
    file = Pipe() if output is None else WavFile(output)
    try:
        yield lambda samples: file.append(int16(samples))
    except BlockingIOError:
        raise InputError(
            f"{output} is being written by another command; wait for its end, or give another name."
        ) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # nobody is left to tell
            raise
        raise InputError(
            f"{output or 'the output'} can't be written any further ({error.strerror}); what came "
            "before is there."
        ) from None
    finally:
        file.close()


class Pipe:
    """The standard output, past its buffer: what can't be written isn't tried again at the end."""

    def __init__(self) -> None:
        buffer = sys.stdout.buffer
        self.file = getattr(buffer, "raw", buffer)

    def append(self, data: bytes) -> None:
        """Write 16-bit samples."""
        _write(self.file, data)

    def close(self) -> None:
        """Nothing: it isn't ours."""


class WavFile:
    """A 16-bit mono WAV file that begins with the first samples and is whole after every piece.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.file: Any = None

    def append(self, data: bytes) -> None:
        """Append 16-bit samples, then tell their number in the header.

        Raises:
            BlockingIOError: another command is writing the file, which stays as it is.
        """
        if not data:
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = FileIO(self.path, "wb", opener=_alone)
        head = _head(self.size + len(data))
        for place, part in ((len(head) + self.size, data), (0, head)):
            self.file.seek(place)
            _write(self.file, part)
        self.size += len(data)

    def close(self) -> None:
        """Close it where it was begun."""
        if self.file is not None:
            self.file.close()


def _head(size: int) -> bytes:
    """What stands before so many bytes of samples."""
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", min(36 + size, LARGEST), b"WAVE"),
        *(b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16),
        *(b"data", min(size, LARGEST)),
    )


def _alone(path: str, flags: int) -> int:
    """Open a file as `FileIO` does, and empty it only once no other command writes it."""
    file = os.open(path, flags & ~os.O_TRUNC, 0o666)
    try:
        _lock(file)
        if stat.S_ISREG(os.fstat(file).st_mode):
            os.ftruncate(file, 0)
    except BaseException:
        os.close(file)
        raise
    return file


def _lock(file: int) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        pass  # Windows and some network disks have no such locks; samples are written all the same


def _write(file: Any, data: bytes) -> None:
    """All of it, to a file without a buffer, which may take less at a time."""
    while data:
        data = data[file.write(data) or 0 :]


# Enhancing ------------------------------------------------------------------------------------


def enhance(stream: Stream, recording: Iterable[Tensor], write: Write, meter: Meter) -> bool:
    """Enhance to the end, or until Ctrl-C; all that was taken in is written whatever happens.

    Returns:
        Whether it came to the end.

    Raises:
        InputError: the recording can't be used any further.
        OSError: the output can't be written any further; nothing more is.
    """
    trouble: BaseException | None = None
    with CtrlC() as ctrl_c:
        try:
            for samples in ctrl_c.pieces(recording):
                enhanced = stream(samples)
                write(enhanced)
                meter.show(samples, enhanced)
        except (InputError, KeyboardInterrupt) as error:
            trouble = error
        finally:
            meter.close()
        write(stream.flush())
    if isinstance(trouble, InputError):
        raise trouble
    return trouble is None


def sentences(report: Report, latency: float, threads: int, card: SoundCard) -> str:
    """The latency report in words.

    Args:
        report: of the stream.
        latency: algorithmic, in seconds.
        threads: that it ran on.
        card: what its devices add.
    """
    lasted = report.hops * report.hop
    times = ", ".join(
        f"{1000 * seconds:.2f} ms {what}"
        for seconds, what in (
            (report.median, "at the 50th percentile"),
            (report.p99, "at the 99th"),
            (report.worst, "at worst"),
        )
    )
    own = (
        f"{lasted:.1f} s enhanced with a real-time factor of {report.real_time_factor:.3f} on "
        f"{threads} thread{'s' if threads > 1 else ''}\n"
        f"latency: {1000 * latency:.0f} ms by construction; each hop of {1000 * report.hop:.0f} ms "
        f"took {times}; {report.late} of {report.hops} came late"
    )
    return "\n".join(filter(None, (own, card.told())))
