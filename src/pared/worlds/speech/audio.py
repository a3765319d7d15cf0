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
from functools import cache
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.errors import InputError
from pared.worlds.optional import need

RATE = 16000  # samples per second, everywhere

# The low-pass filter of `resampled`: a windowed sinc.
ZEROS = 32  # its zero crossings on either side
ROLLOFF = 0.94  # its cutoff, of the highest frequency that both rates hold
BETA = 8.6  # of the Kaiser window: 85 dB below in the stop band

SILENCE = 2**-15  # one step of 16 bits
UNKNOWN_SIZE = 0x7FFFF000  # and above: what programs write that don't know a length beforehand
LARGEST_PAGE = 27 + 255 + 255 * 255  # of an OGG, in bytes


class Unreadable(Exception):
    """Why a sound can't be used, as the end of a sentence that begins with its name."""


def read(source: str | Path | bytes) -> Tensor:
    """A recording, float32 (samples,) in [-1, 1], mono, at 16 kHz.

    Channels are averaged, other rates resampled, integers scaled. WAV, FLAC, OGG and MP3 are read.

    Args:
        source: the file, or its content.

    Raises:
        InputError: the file is missing, empty, cut off, silent, no sound, or has NaN samples; or
            `soundfile` isn't installed.
    """
    try:
        return decoded(source)
    except Unreadable as fault:
        name = "the recording" if isinstance(source, bytes) else repr(str(source))
        raise InputError(f"{name} {fault}; give a whole recording that can be heard.") from fault


def decoded(source: str | Path | bytes) -> Tensor:
    """As `read`.

    Raises:
        Unreadable: instead of InputError, for callers who have more to say.
    """
    with opened(source) as file:
        try:
            frames = file.read(dtype="float32", always_2d=True)
        except RuntimeError as error:
            raise Unreadable("is damaged") from error
        # The length of an MP3 can be an estimate.
        if len(frames) < file.frames * (0.98 if file.format == "MP3" else 1):
            raise Unreadable(f"is cut off after {len(frames)} of {file.frames} samples")
        rate = file.samplerate
    waveform = torch.from_numpy(frames).mean(dim=1)
    finite = waveform.isfinite()
    if not finite.all():
        second = finite.logical_not().nonzero()[0].item() / rate
        raise Unreadable(f"has a sample that is NaN or infinite, at {second:.3f} s")
    if waveform.abs().amax() < SILENCE:
        raise Unreadable("is silent from beginning to end")
    return resampled(waveform, rate)


def opened(source: str | Path | bytes):
    """A `soundfile.SoundFile` whose header has been checked; close it.

    Raises:
        Unreadable: missing, empty, cut off, or no sound.
        InputError: `soundfile` isn't installed.
    """
    soundfile = need("soundfile", extra="speech")
    if not isinstance(source, bytes):
        source = Path(source).expanduser()
        if not source.is_file():
            raise Unreadable("doesn't exist or is no file")
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if not size:
        raise Unreadable("is empty")
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        if missing := _missing(stream, size):
            raise Unreadable(f"is cut off: {missing}")
    try:
        file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except RuntimeError as error:
        raise Unreadable("is damaged, or no WAV, FLAC, OGG or MP3") from error
    if not file.frames:
        file.close()
        raise Unreadable("has no samples")
    return file


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
    if rate == wanted or not len(waveform):
        return waveform
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    kernels = _polyphase(up, down)
    before = -kernels[0][0]
    width = before + kernels[-1][0] + len(kernels[-1][1])
    length = -(-len(waveform) * up // down)
    blocks = -(-length // up)
    # Block q of `up` samples out is made of those from `before` ahead of q * down on.
    after = (blocks - 1) * down + width - before - len(waveform)
    frames = F.pad(waveform, (before, max(0, after))).unfold(0, width, down)[:blocks]
    out = [
        torch.cat([part[:, before + at :][:, : len(k)] @ k for at, k in kernels], dim=1).flatten()
        for part in frames.split(max(1, 2**22 // width))  # bounds the memory
    ]
    return torch.cat(out)[:length]


@cache
def _polyphase(up: int, down: int) -> list[tuple[int, Tensor]]:
    """How the `up` samples of a block come about, some neighbours at a time.

    Returns:
        For each group where the samples begin that it is made of, counted from where the block
        does, and their weights, (samples in, samples out).
    """
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
