"""The microphone and the loudspeaker of `pared enrol` and `pared enhance`, by sounddevice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from pared.errors import InputError

RATE = 16_000
# Samples that a device is asked for at a time: those of a hop.
HOP = 256
# By default sounddevice asks for buffers that are safe rather than short.
FORM = {"channels": 1, "dtype": "int16", "latency": "low"}


@dataclass
class SoundCard:
    """What carries sound in and out, and what it does to it on the way.

    Attributes:
        latency: seconds by which each device itself is late, by its name, once it runs.
        lost: how often the microphone lost sound, which wasn't fetched in time.
    """

    latency: dict[str, float] = field(default_factory=dict)
    lost: int = 0

    def record(self, seconds: float | None = None) -> Iterator[bytes]:
        """16-bit mono samples of the microphone at 16 kHz, a hop at a time.

        The device starts, and says so on the standard error, when the first hop is asked for.

        Args:
            seconds: when to end; by default never.

        Raises:
            InputError: there is no microphone, or not any more.
        """
        return self._hops(_sounddevice(), seconds)

    def _hops(self, sounddevice: Any, seconds: float | None) -> Iterator[bytes]:
        hops = math.inf if seconds is None else math.ceil(seconds * RATE / HOP)
        try:
            with sounddevice.RawInputStream(RATE, HOP, **FORM) as device:
                self.latency["microphone"] = device.latency
                how_long = "until Ctrl-C" if seconds is None else f"for {seconds:g} s"
                click.echo(f"listening {how_long} ...", err=True)
                while hops > 0:
                    block, overflowed = device.read(HOP)
                    self.lost += bool(overflowed)
                    hops -= 1
                    yield bytes(block)
        except sounddevice.PortAudioError as error:
            raise InputError(
                f"the microphone can't be used ({error}); plug one in, or pipe the samples in."
            ) from None

    @contextmanager
    def playing(self) -> Iterator[Callable[[bytes], object]]:
        """Within the context 16-bit mono samples at 16 kHz are played.

        Raises:
            InputError: there is no loudspeaker, or not any more.
        """
        sounddevice = _sounddevice()
        try:
            with sounddevice.RawOutputStream(RATE, HOP, **FORM) as device:
                self.latency["loudspeaker"] = device.latency
                yield device.write
        except sounddevice.PortAudioError as error:
            raise InputError(
                f"the loudspeaker can't be used ({error}); give -o FILE.wav."
            ) from None

    def told(self) -> str:
        """What to know of the devices that ran, in words; "" where none did."""
        if not self.latency:
            return ""
        late = " and ".join(f"{1000 * s:.1f} ms of the {name}" for name, s in self.latency.items())
        return f"devices: {late} come on top; sound was lost {self.times_lost()}"

    def times_lost(self) -> str:
        """`once`, or `2 times`."""
        return "once" if self.lost == 1 else f"{self.lost} times"


def _sounddevice() -> Any:
    try:
        import sounddevice  # its library may be missing too, which is an OSError
    except (ImportError, OSError):
        raise InputError(
            "a microphone needs the package sounddevice, and PortAudio under it; pip install "
            "'pared[microphone]', or pipe the samples in."
        ) from None
    return sounddevice
