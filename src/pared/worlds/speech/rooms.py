"""Simulated rooms: early reflections from image sources, then noise that decays.

Image sources after Allen and Berkley (1979), with fractional delays after Peterson (1986), give the
direct sound and the first 50 ms of reflections exactly. Later ones are so dense that only their
energy matters: they are noise with the variance that the images would have had on average, so the
two parts meet without a factor to be fitted.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.worlds.speech.audio import RATE

SOUND = 343.0  # metres per second
EARLY = 0.05  # seconds after the direct sound
TAPS = 81  # of a fractional delay


@dataclass(frozen=True)
class Room:
    """A box of four walls, floor and ceiling that all reflect alike.

    Attributes:
        size: length, width, height in metres, (3,).
        microphone: its place in metres, (3,).
        t60: seconds until the sound has lost 60 dB.
    """

    size: Tensor
    microphone: Tensor
    t60: float

    @classmethod
    def drawn(cls, generator: torch.Generator, t60: tuple[float, float]) -> "Room":
        """A room of 3 to 8 m by 3 to 6 m by 2.5 to 3.5 m; `t60` is the range of its own."""
        low, high = torch.tensor([[3.0, 3.0, 2.5], [8.0, 6.0, 3.5]])
        size = low + (high - low) * torch.rand(3, generator=generator)
        seconds = t60[0] + (t60[1] - t60[0]) * torch.rand((), generator=generator).item()
        return cls(size, _place(size, generator), seconds)

    def source(self, generator: torch.Generator) -> Tensor:
        """A place for a talker, half a metre from the walls and from the microphone, (3,)."""
        while True:
            place = _place(self.size, generator)
            if torch.dist(place, self.microphone) > 0.5:
                return place

    @property
    def volume(self) -> float:
        """Cubic metres."""
        return float(self.size.prod())

    @property
    def reflection(self) -> float:
        """What a wall leaves of a pressure, after Eyring: the energy of 1 - alpha."""
        x, y, z = self.size.tolist()
        surface = 2 * (x * y + y * z + z * x)
        alpha = -math.expm1(-24 * math.log(10) * self.volume / (SOUND * surface * self.t60))
        return math.sqrt(1 - alpha)


def _place(size: Tensor, generator: torch.Generator) -> Tensor:
    return 0.5 + (size - 1) * torch.rand(3, generator=generator)


def impulse_response(
    room: Room, source: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What a click at `source` becomes at the microphone: its early part, and the whole.

    Args:
        room: the room.
        source: place of the talker in metres, (3,).
        generator: of the late reflections.

    Returns:
        Both (samples,), as long as the room takes to lose 60 dB after the direct sound, whose
        amplitude at d metres is 1 / (4 pi d).
    """
    direct = float(torch.dist(source, room.microphone)) / SOUND
    early = early_response(room, source, direct + EARLY)
    length = math.ceil((direct + room.t60) * RATE)
    early = F.pad(early, (0, max(0, length - len(early))))
    time = torch.arange(len(early)) / RATE
    # Images lie one in each volume, so 4 pi d^2 c dt / V of them arrive in dt, each with the
    # energy (1 / (4 pi d))^2 and what the walls have left of it.
    power = SOUND / (4 * math.pi * room.volume * RATE) * 10 ** (-6 * time / room.t60)
    late = torch.randn(len(early), generator=generator) * power.sqrt()
    return early, early + late * (time > direct + EARLY)


def early_response(room: Room, source: Tensor, seconds: float) -> Tensor:
    """The direct sound and all reflections that arrive within `seconds`, (samples,)."""
    distance, reflections = images(room, source, seconds * SOUND)
    gain = room.reflection**reflections / (4 * math.pi * distance)
    delay = distance * (RATE / SOUND)
    taps = torch.arange(TAPS) - TAPS // 2
    nearest = delay.round().long()[:, None] + taps  # (images, taps)
    offset = nearest - delay[:, None]
    hann = 0.5 + 0.5 * torch.cos(2 * math.pi * offset / (TAPS + 1))
    pulses = gain[:, None] * torch.sinc(offset) * hann
    response = torch.zeros(math.ceil(seconds * RATE) + TAPS)
    # What a filter would put before the click, at a source next to the microphone, is dropped.
    kept = nearest >= 0
    return response.index_add_(0, nearest[kept], pulses[kept])


def images(room: Room, source: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Distances of all image sources within `reach` metres, and their numbers of reflections.

    Along one axis the images of s in a room of length L lie at (1 - 2p) s + 2 n L, for p in {0, 1}
    and all n, and have been reflected |n - p| + |n| times.

    Returns:
        Both (images,), the source itself among them.
    """
    squares, counts = torch.zeros(1), torch.zeros(1)
    for s, length, microphone in zip(source, room.size, room.microphone, strict=True):
        most = math.ceil(reach / (2 * float(length))) + 1
        n, p = torch.arange(-most, most + 1)[:, None], torch.arange(2)
        offset = (1 - 2 * p) * s + 2 * n * length - microphone
        reflections = (n - p).abs() + n.abs()
        squares = (squares[:, None] + offset.flatten() ** 2).flatten()
        counts = (counts[:, None] + reflections.flatten()).flatten()
        near = squares <= reach**2
        squares, counts = squares[near], counts[near]
    return squares.sqrt(), counts


def heard(waveform: Tensor, response: Tensor) -> Tensor:
    """A sound in a room: convolved with an impulse response, and cut to its own length."""
    length = len(waveform) + len(response) - 1
    size = 1 << (length - 1).bit_length()
    spectrum = torch.fft.rfft(waveform, size) * torch.fft.rfft(response, size)
    return torch.fft.irfft(spectrum, size)[: len(waveform)]
