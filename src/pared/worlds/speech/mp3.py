"""How long an MP3 lasts, by its frames (ISO/IEC 11172-3 and 13818-3, Layer III).

What its first frame tells is the length of what was encoded at once, and where it tells nothing, a
decoder guesses from that frame's bitrate. Several files put one behind the other, or a bitrate that
varies, belie both.
"""

from __future__ import annotations

import mmap
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

# Kbit/s by their number, from 1 on: those of version 1, and those of 2 and 2.5.
BITRATES = (
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
# Samples per second of version 1, and into how many parts the other versions, by their number,
# divide them.
RATES = (44100, 48000, 32000)
PARTS = {3: 1, 2: 2, 0: 4}


class Frame(NamedTuple):
    """What the header of a frame tells.

    Attributes:
        size: in bytes.
        samples: that it holds of each channel.
        rate: samples per second.
    """

    size: int
    samples: int
    rate: int


def seconds(source: Path | bytes) -> float:
    """What all frames of an MP3 last together; 0 where none was found.

    Args:
        source: the file, or its content; not empty.

    Raises:
        OSError: it can't be read.
    """
    if isinstance(source, bytes):
        return _seconds(source)
    with ExitStack() as opened:
        file = opened.enter_context(source.open("rb"))
        return _seconds(opened.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _seconds(content: bytes | mmap.mmap) -> float:
    at, total, within = 0, 0.0, False
    while at >= 0:
        frame = _frame(content, at)
        # Tags hold anything: what looks like a frame is one if another follows it.
        if frame and (within or _followed(content, at, frame)):
            total += frame.samples / frame.rate
            at, within = at + frame.size, True
        else:
            at, within = content.find(b"\xff", at + 1), False
    return total


def _followed(content: bytes | mmap.mmap, at: int, frame: Frame) -> bool:
    after = _frame(content, at + frame.size)
    return after is not None and after[1:] == frame[1:]


def _frame(content: bytes | mmap.mmap, at: int) -> Frame | None:
    """The frame whose header is there, if there is one."""
    if at + 4 > len(content):
        return None
    (head,) = struct.unpack_from(">I", content, at)
    version, layer, bitrate, rate = head >> 19 & 3, head >> 17 & 3, head >> 12 & 15, head >> 10 & 3
    # Version 1 and rate 3 don't exist, layer 1 is III, and bitrate 0 stands for any other.
    if head >> 21 != 0x7FF or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        return None
    hertz, samples = RATES[rate] // PARTS[version], 1152 if version == 3 else 576
    bits = 1000 * BITRATES[version != 3][bitrate - 1]  # a second
    return Frame(samples // 8 * bits // hertz + (head >> 9 & 1), samples, hertz)
