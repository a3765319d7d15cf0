"""Sound files in and out: whatever is given becomes float32 in [-1, 1], mono, at 16 kHz.

Reading users' files needs `soundfile`; what the world itself has spoken needs nothing.
"""

from __future__ import annotations

import io
import math
import os
import secrets
import struct
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.errors import InputError
from pared.worlds.optional import need
from pared.worlds.speech import mp3

if TYPE_CHECKING:
    from soundfile import SoundFile

RATE = 16000  # samples per second, everywhere
BLOCK = 1 << 16  # samples that are taken from a file at a time

# The low-pass filter of `resampled`: a windowed sinc.
ZEROS = 32  # its zero crossings on either side
ROLLOFF = 0.94  # its cutoff, of the highest frequency that both rates hold
BETA = 8.6  # of the Kaiser window: 85 dB below in the stop band

SILENCE = 2**-15  # one step of 16 bits
UNKNOWN_SIZE = 0x7FFFF000  # and above: what programs write that don't know a length beforehand
UNKNOWN_FRAMES = 2**63 - 1  # what libsndfile tells of a FLAC of such a program
PADDING = 0.5  # seconds that the frames of an MP3 may last beyond its sound
LARGEST_PAGE = 27 + 255 + 255 * 255  # of an OGG, in bytes


class Unreadable(Exception):
    """Why a sound can't be used, as the end of a sentence that begins with its name."""


def read(source: str | Path | bytes) -> Tensor:
    """A recording, float32 (samples,) in [-1, 1], mono, at 16 kHz.

    Channels are averaged, other rates resampled, integers scaled. WAV, FLAC, OGG and MP3 are read.

    Args:
        source: the file, or its content.

    Raises:
        InputError: the file is missing, not to be read, empty, cut off, silent, no sound, joined
            of several MP3s, or has NaN samples; or `soundfile` isn't installed.
    """
    with _refusing(source):
        return decoded(source)


def check(source: str | Path | bytes) -> None:
    """Read a recording once, for its faults.

    Raises:
        InputError: as `read`.
    """
    with _refusing(source), opened(source) as file:
        for _ in _mono(file):
            pass


def read_blocks(source: str | Path | bytes, wanted: int = RATE) -> Iterator[Tensor]:
    """As `read`, block by block, so that memory stays the same however long the recording is.

    Args:
        source: the file, or its content.
        wanted: samples per second that come out.

    Raises:
        InputError: as `read`, at the block where it shows; `check` tells beforehand.
    """
    with _refusing(source), opened(source) as file:
        resampler = Resampler(file.samplerate, wanted)
        for block in _mono(file):
            yield resampler(block)
        yield resampler.flush()


@contextmanager
def _refusing(source: str | Path | bytes) -> Iterator[None]:
    """Within the context a fault is told to the person who gave the recording."""
    try:
        yield
    except Unreadable as fault:
        name = "the recording" if isinstance(source, bytes) else repr(str(source))
        raise InputError(f"{name} {fault}; give a whole recording that can be heard.") from fault


def decoded(source: str | Path | bytes) -> Tensor:
    """As `read`.

    Raises:
        Unreadable: instead of InputError, for callers who have more to say.
    """
    with opened(source) as file:
        return resampled(torch.cat(list(_mono(file))), file.samplerate)


def _mono(file: SoundFile) -> Iterator[Tensor]:
    """An opened sound block by block, (samples,) at its own rate.

    Raises:
        Unreadable: damaged or cut off, a sample that is no number, or nothing but silence.
    """
    taken, loudest = 0, 0.0
    while True:
        try:
            frames = file.read(BLOCK, dtype="float32", always_2d=True)
        except RuntimeError as error:
            raise Unreadable("is damaged") from error
        if not len(frames):
            break
        block = torch.from_numpy(frames).mean(dim=1)
        if not (finite := block.isfinite()).all():
            second = (taken + int((~finite).nonzero()[0])) / file.samplerate
            raise Unreadable(f"has a sample that is NaN or infinite, at {second:.3f} s")
        taken += len(block)
        loudest = max(loudest, float(block.abs().amax()))
        yield block
    # The length of an MP3 can be an estimate.
    told = 0 if file.frames == UNKNOWN_FRAMES else file.frames
    if taken < told * (0.98 if file.format == "MP3" else 1):
        raise Unreadable(f"is cut off after {taken} of {file.frames} samples")
    if loudest < SILENCE:
        raise Unreadable("is silent from beginning to end")


def opened(source: str | Path | bytes):
    """A `soundfile.SoundFile` whose header has been checked; close it.

    Raises:
        Unreadable: missing, not to be read, empty, cut off, no sound, or an MP3 of which only a
            part can be read.
        InputError: `soundfile` isn't installed.
    """
    soundfile = need("soundfile", extra="speech")
    if not isinstance(source, bytes):
        source = Path(os.path.expanduser(source))
    try:
        _check_whole(source)
    except OSError as error:
        raise Unreadable(f"can't be read ({error.strerror})") from error
    try:
        file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except RuntimeError as error:
        raise Unreadable("is damaged, or no WAV, FLAC, OGG or MP3") from error
    try:
        _check_length(file, source)
    except Unreadable:
        file.close()
        raise
    except OSError as error:
        file.close()
        raise Unreadable(f"can't be read ({error.strerror})") from error
    return file


def frames_of(file: SoundFile) -> int:
    """Samples of an opened sound at its own rate; it's read where its header doesn't tell.

    Raises:
        Unreadable: as it's read.
    """
    return sum(map(len, _mono(file))) if file.frames == UNKNOWN_FRAMES else file.frames


def _check_length(file: SoundFile, source: Path | bytes) -> None:
    """Refuse a sound that is empty, or of which libsndfile would read a part only.

    Raises:
        Unreadable: it is.
        OSError: it can't be read any more.
    """
    if not file.frames:
        raise Unreadable("has no samples")
    if file.frames == UNKNOWN_FRAMES:
        # It would be sought in after every read, which fails at the end.
        file.seekable = lambda: False
    told = file.frames / file.samplerate
    if file.format == "MP3" and (held := mp3.seconds(source)) > 1.02 * told + PADDING:
        raise Unreadable(
            f"lasts {held:.1f} s, of which only the first {told:.1f} can be read, as in joined "
            "files (`ffmpeg -i old.mp3 new.flac` makes a whole one)"
        )


def _check_whole(source: Path | bytes) -> None:
    """Refuse what is missing, empty or cut off.

    Raises:
        Unreadable: it is.
        OSError: it can't be read.
    """
    if not isinstance(source, bytes) and not source.is_file():
        raise Unreadable("doesn't exist or is no file")
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if not size:
        raise Unreadable("is empty")
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        if missing := _missing(stream, size):
            raise Unreadable(f"is cut off: {missing}")


def _missing(stream: BinaryIO, size: int) -> str:
    """What a WAV or OGG lacks at its end, which libsndfile passes over; "" for nothing."""
    head = stream.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        while len(chunk := stream.read(8)) == 8:
            name, length = struct.unpack("<4sI", chunk)
            if name == b"data":
                lost = stream.tell() + length - size
                known = length < UNKNOWN_SIZE
                return f"its last {lost} bytes are missing" if known and lost > 0 else ""
            stream.seek(length + length % 2, os.SEEK_CUR)
    if head[:4] == b"OggS":
        stream.seek(max(0, size - LARGEST_PAGE))
        page = stream.read().rpartition(b"OggS")[2]
        # Flags, of which 4 marks the last page; then, at the end of the head, the parts' sizes.
        whole = len(page) > 22 and len(page) >= 23 + page[22] + sum(page[23 : 23 + page[22]])
        if not whole or not page[1] & 4:
            return "its last page is missing"
    return ""


def read_pcm(path: Path) -> tuple[Tensor, int]:
    """A 16-bit mono WAV as synthesizers and `write` make them: int16 (samples,), and its rate."""
    with wave.open(str(path), "rb") as file:
        content = file.readframes(file.getnframes())
        return torch.frombuffer(bytearray(content), dtype=torch.int16), file.getframerate()


def write(path: str | Path, waveform: Tensor, rate: int = RATE) -> None:
    """Store a sound as 16-bit WAV; the file appears when it is whole.

    Args:
        path: of the file.
        waveform: float (samples,); what is beyond [-1, 1] is clipped.
        rate: samples per second.

    Raises:
        InputError: the sound has another shape, or samples that are NaN.
    """
    if waveform.ndim != 1 or waveform.isnan().any():
        raise InputError(
            f"a sound of shape {tuple(waveform.shape)}"
            f"{' with NaN samples' if waveform.isnan().any() else ''} can't be stored; it must be "
            "(samples,) of numbers."
        )
    samples = to_int16(waveform.detach().cpu())
    path = Path(path)
    # Unlike a file of `tempfile`, it gets the user's usual permissions.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with wave.open(str(partial), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.numpy().tobytes())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def to_int16(waveform: Tensor) -> Tensor:
    """Samples in [-1, 1] as 16-bit integers; what is beyond is clipped."""
    return (32768 * waveform).round().clamp(-32768, 32767).to(torch.int16)


def trimmed(waveform: Tensor, floor: float = -50.0, margin: float = 0.02) -> Tensor:
    """A sound without the silence before and after it.

    Args:
        waveform: (samples,) at 16 kHz.
        floor: what counts as silence, in dB below the loudest 10 ms.
        margin: what is left of it, in seconds.
    """
    frame = RATE // 100
    power = F.pad(waveform, (0, -len(waveform) % frame)).view(-1, frame).square().mean(dim=1)
    loud = (power > power.amax() * 10 ** (floor / 10)).nonzero()
    if not len(loud):
        return waveform
    keep = round(margin * RATE)
    return waveform[max(0, int(loud[0]) * frame - keep) : (int(loud[-1]) + 1) * frame + keep]


def resampled(waveform: Tensor, rate: int, wanted: int = RATE) -> Tensor:
    """A sound at another rate, through a low-pass filter below half of the lower one.

    Args:
        waveform: float (samples,).
        rate: its samples per second.
        wanted: samples per second that come out.

    Returns:
        (samples * wanted / rate rounded up,); sample n is the filtered sound at n / wanted seconds.
    """
    if rate == wanted:
        return waveform
    resampler = Resampler(rate, wanted)
    return torch.cat([resampler(waveform), resampler.flush()])


class Resampler:
    """Brings a sound that comes piece by piece to another rate, as `resampled` does the whole.

    Args:
        rate: samples per second that come in.
        wanted: that come out.
    """

    def __init__(self, rate: int, wanted: int = RATE) -> None:
        common = math.gcd(rate, wanted)
        self.up, self.down = wanted // common, rate // common
        self.kernels = _polyphase(self.up, self.down)
        # Block q of `up` samples out is made of those from `before` ahead of q * down on.
        self.before = -self.kernels[0][0]
        self.width = self.before + self.kernels[-1][0] + len(self.kernels[-1][1])
        self.waiting = torch.zeros(self.before)
        self.taken = self.given = 0

    def __call__(self, samples: Tensor) -> Tensor:
        """What can be given out after these samples; both float (samples,)."""
        self.taken += len(samples)
        self.waiting = torch.cat([self.waiting, samples])
        return self._made((len(self.waiting) - self.width) // self.down + 1)

    def flush(self) -> Tensor:
        """The rest, once nothing more comes."""
        length = -(-self.taken * self.up // self.down) - self.given
        blocks = -(-length // self.up)
        missing = (blocks - 1) * self.down + self.width - len(self.waiting)
        self.waiting = F.pad(self.waiting, (0, max(0, missing)))
        return self._made(blocks)[:length]

    def _made(self, blocks: int) -> Tensor:
        """So many blocks out, (blocks * up,)."""
        if blocks < 1:
            return torch.empty(0)
        frames = self.waiting.unfold(0, self.width, self.down)[:blocks]
        out = [
            torch.cat(
                [part[:, self.before + at :][:, : len(k)] @ k for at, k in self.kernels], dim=1
            ).flatten()
            for part in frames.split(max(1, 2**22 // self.width))  # bounds the memory
        ]
        # A copy, or a view would hold on to all that came.
        self.waiting = self.waiting[blocks * self.down :].clone()
        self.given += blocks * self.up
        return torch.cat(out)


@cache
def _polyphase(up: int, down: int) -> list[tuple[int, Tensor]]:
    """How the `up` samples of a block come about, some neighbours at a time.

    Returns:
        For each group where the samples begin that it is made of, counted from where the block
        does, and their weights, (samples in, samples out).
    """
    if up == down:
        return [(0, torch.ones(1, 1))]
    cutoff = ROLLOFF * min(1.0, up / down)  # of half the rate that comes in
    half = math.ceil(ZEROS / cutoff)
    kernels = []
    for phases in torch.arange(up, dtype=torch.float64).split(64):
        moment = phases * down / up
        at, end = int(moment[0]) - half, int(moment[-1]) + half + 2
        offset = torch.arange(at, end)[:, None] - moment
        window = torch.special.i0(BETA * (1 - (offset / (half + 1)) ** 2).clamp(min=0).sqrt())
        kernel = torch.where(offset.abs() <= half + 1, torch.sinc(cutoff * offset) * window, 0)
        # Every phase passes a constant unchanged.
        kernels.append((at, (kernel / kernel.sum(dim=0)).float()))
    return kernels
