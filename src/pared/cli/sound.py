"""What `pared enrol` and `pared enhance` share: sound in and out, the meter, the report."""

from __future__ import annotations

import math
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pared.cli.ctrl_c import CtrlC
from pared.errors import InputError
from pared.worlds import house

if TYPE_CHECKING:
    from io import BufferedReader

    from torch import Tensor

    from pared.speech.streaming_pse.model import StreamingPSEModel
    from pared.speech.streaming_pse.stream import Report, Stream

MODEL = "house:streaming-pse"
RATE = 16_000
PIPE, MICROPHONE = "-", "mic"
# Samples that are taken from a file at a time, and from a microphone: those of a hop.
PIECE, HOP = 4096, 256

model_option = click.option(
    "--model",
    metavar="MODEL",
    default=MODEL,
    show_default=True,
    help="The enhancer: a house model or a folder.",
)


def enhancer_of(name: str) -> StreamingPSEModel:
    """The model behind a `--model`.

    Raises:
        InputError: there is none, or it's something else.
    """
    folder = house.folder_of(name)
    if not Path(folder).is_dir():
        raise InputError(f"there is no folder {name!r}; give a saved enhancer, or {MODEL}.")
    from pared.speech.streaming_pse.model import load

    return load(folder)


# Sound in -------------------------------------------------------------------------------------


def pieces(source: str, seconds: float | None = None) -> Iterator[Tensor]:
    """A recording piece by piece, float (samples,) at 16 kHz, as it comes.

    Args:
        source: an audio file, "-" for a pipe of 16-bit samples, or "mic".
        seconds: when to end; by default at the end of file or pipe, and never with a microphone.

    Raises:
        InputError: there is nothing, or nothing that can be used.
    """
    if source == PIPE:
        return _piped()
    if source == MICROPHONE:
        return _recorded(seconds)
    from pared.worlds.speech import audio

    audio.check(source)
    return (piece for block in audio.read_blocks(source) for piece in block.split(PIECE))


def _piped() -> Iterator[Tensor]:
    if sys.stdin.isatty():
        raise InputError(
            "nothing is piped in; give 16-bit mono samples at 16 kHz, such as `sox talk.flac -t "
            "raw -r 16000 -b 16 -c 1 - | pared enhance - ...`."
        )
    half, begun = b"", False
    stream = cast("BufferedReader", sys.stdin.buffer)
    while block := stream.read1(1 << 16):
        if not begun and block.startswith((b"RIFF", b"fLaC", b"OggS")):
            raise InputError(
                "the pipe carries a sound file; give its name instead, or pipe bare 16-bit mono "
                "samples at 16 kHz."
            )
        begun, block = True, half + block
        whole = len(block) // 2 * 2
        half = block[whole:]
        yield _from_int16(block[:whole])
    if not begun:
        raise InputError(
            "the pipe closed before a sample came; pipe 16-bit mono samples at 16 kHz."
        )


def _recorded(seconds: float | None) -> Iterator[Tensor]:
    sounddevice = _sounddevice()
    hops = math.inf if seconds is None else math.ceil(seconds * RATE / HOP)
    try:
        with sounddevice.RawInputStream(RATE, HOP, channels=1, dtype="int16") as device:
            while hops > 0:
                block, _ = device.read(HOP)
                hops -= 1
                yield _from_int16(bytes(block))
    except sounddevice.PortAudioError as error:
        raise InputError(f"the microphone can't be used ({error}); plug one in.") from None


def _sounddevice() -> Any:
    try:
        import sounddevice  # its library may be missing too, which is an OSError
    except (ImportError, OSError):
        raise InputError(
            "a microphone needs the package sounddevice, and PortAudio under it; pip install "
            "'pared[microphone]', or pipe the samples in."
        ) from None
    return sounddevice


def _from_int16(block: bytes) -> Tensor:
    import torch

    if not block:
        return torch.empty(0)
    return torch.frombuffer(bytearray(block), dtype=torch.int16).float() / 32768


# Sound out ------------------------------------------------------------------------------------

Write = Callable[["Tensor"], None]


@contextmanager
def written(output: Path | None, source: str) -> Iterator[Write]:
    """What takes the enhanced samples: a WAV file, a pipe, or the loudspeaker.

    A file is whole after every piece, whatever happens next.

    Raises:
        InputError: the place can't be written, or there is none.
    """
    with ExitStack() as closing:
        if output is not None:
            file = WavFile(output)
            closing.callback(file.file.close)
            yield file.write
        elif not sys.stdout.isatty():
            yield _pipe
        elif source == MICROPHONE:
            yield _loudspeaker(closing)
        else:
            raise InputError("there is nowhere to write; give -o FILE.wav, or pipe the output on.")


class WavFile:
    """A 16-bit mono WAV file that is whole after every piece.

    Args:
        path: of the file.

    Raises:
        InputError: it can't be written, at first or any further.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        try:
            self.file = path.open("wb", buffering=0)
        except OSError as error:
            raise InputError(f"{path} can't be written ({error.strerror}).") from None
        self.append(b"")

    def write(self, samples: Tensor) -> None:
        """Append float samples."""
        self.append(_to_int16(samples))

    def append(self, data: bytes) -> None:
        """Append 16-bit samples, then tell their number in the header."""
        head = struct.pack(
            "<4sI4s4sIHHIIHH4sI",
            *(b"RIFF", 36 + self.size + len(data), b"WAVE"),
            *(b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16),
            *(b"data", self.size + len(data)),
        )
        try:
            for place, part in ((len(head) + self.size, data), (0, head)):
                self.file.seek(place)
                while part:
                    part = part[self.file.write(part) :]
        except OSError as error:
            raise InputError(
                f"{self.path} can't be written any further ({error.strerror}); what came before "
                "is there."
            ) from None
        self.size += len(data)


def _pipe(samples: Tensor) -> None:
    sys.stdout.buffer.write(_to_int16(samples))
    sys.stdout.buffer.flush()


def _loudspeaker(closing: ExitStack) -> Write:
    sounddevice = _sounddevice()
    try:
        device = sounddevice.RawOutputStream(RATE, HOP, channels=1, dtype="int16")
        closing.enter_context(device)
    except sounddevice.PortAudioError as error:
        raise InputError(f"the loudspeaker can't be used ({error}); give -o FILE.wav.") from None
    return lambda samples: device.write(_to_int16(samples))


def _to_int16(samples: Tensor) -> bytes:
    from pared.worlds.speech.audio import to_int16

    return to_int16(samples).numpy().tobytes()


# Enhancing ------------------------------------------------------------------------------------


def enhance(stream: Stream, recording: Iterable[Tensor], write: Write, meter: Meter) -> bool:
    """Enhance to the end, or until Ctrl-C; all that was taken in is written whatever happens.

    Returns:
        Whether it came to the end.

    Raises:
        InputError: the recording can't be used any further.
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
        meter.close()
        write(stream.flush())
    if isinstance(trouble, InputError):
        raise trouble
    return trouble is None


class Meter:
    """A line with the levels of both sides, over and over, on the standard error.

    Args:
        wanted: False shows nothing; None only shows where a person is looking.
    """

    EVERY, CELLS, LOWEST = 0.1, 20, -60.0

    def __init__(self, wanted: bool | None) -> None:
        self.shown = sys.stderr.isatty() if wanted is None else wanted
        self.samples = 0
        self.sums, self.count = [0.0, 0.0], 0
        self.due = 0.0

    def show(self, taken: Tensor, given: Tensor) -> None:
        """Count a piece in and what came out, and draw the line where it is due."""
        if not self.shown:
            return
        self.samples += len(taken)
        self.count += len(taken)
        self.sums[0] += float(taken.square().sum())
        self.sums[1] += float(given.square().sum())
        if time.monotonic() >= self.due:
            self._draw()

    def _draw(self) -> None:
        if not self.count:
            return
        self.due = time.monotonic() + self.EVERY
        heard, kept = (self.bar(total / self.count) for total in self.sums)
        click.echo(f"\r{self.samples / RATE:8.1f} s  in {heard}  out {kept}", nl=False, err=True)
        self.sums, self.count = [0.0, 0.0], 0

    def bar(self, power: float) -> str:
        """`#####...............  -45 dB` from a mean power."""
        level = max(self.LOWEST, 10 * math.log10(power + 1e-12))
        cells = min(self.CELLS, round(self.CELLS * (1 - level / self.LOWEST)))
        return f"{'#' * cells:.<{self.CELLS}} {level:4.0f} dB"

    def close(self) -> None:
        """Draw what wasn't yet, and end the line."""
        self._draw()
        if self.samples:
            click.echo(err=True)


def sentences(report: Report, latency: float, threads: int) -> str:
    """The latency report in words.

    Args:
        report: of the stream.
        latency: algorithmic, in seconds.
        threads: that it ran on.
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
    return (
        f"{lasted:.1f} s enhanced with a real-time factor of {report.real_time_factor:.3f} on "
        f"{threads} thread{'s' if threads > 1 else ''}\n"
        f"latency: {1000 * latency:.0f} ms by construction; each hop of {1000 * report.hop:.0f} ms "
        f"took {times}; {report.late} of {report.hops} came late"
    )
