"""A convolution that reads samples, started as a bank of band-pass filters.

A recogniser that learns from raw samples has to find filters before it can learn anything else, and
a few hours of speech are little to find them by. Here they are given, as good as a spectrum's, and
free to change (as Zeghidour et al. 2018, arXiv 1711.01161, start theirs): cosines under bells,
their frequencies spaced as the ear hears. Each frequency comes in four phases, a quarter of a turn
apart: once rectified, as the activation behind them nearly does, they sum up to the band's
amplitude, wherever in its period a window begins. High bands, soft in speech, are amplified.
"""

import math

import torch
from torch import Tensor, nn

PHASES = 4
LOWEST, HIGHEST = 60.0, 0.475  # in Hz, and of the rate
OVERLAP = 1.5  # width of a band at half its height, of the distance to the next
SOFT_FROM = 500.0  # Hz: speech loses half its amplitude an octave above
# A shorter window, such as wav2vec 2.0's, is that of one of several layers which filter together.
SHORTEST = 0.01  # seconds


def start_as_filterbank(model: nn.Module, rate: int) -> bool:
    """Set the weights of a model's first convolution, if it is one that filters samples.

    Args:
        model: with any weights.
        rate: samples per second that it reads.

    Returns:
        Whether it was: it reads one channel by windows of 10 ms at least.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv1d)), None)
    if first is None or first.in_channels > 1 or first.kernel_size[0] < SHORTEST * rate:
        return False
    # Wherever models are made just now, such as on the meta device.
    with torch.no_grad(), torch.device("cpu"):
        first.weight.copy_(filters(first.out_channels, first.kernel_size[0], rate)[:, None])
    return True


def filters(count: int, length: int, rate: int) -> Tensor:
    """Band-pass filters, four to a band, low bands first: float32 (count, length)."""
    bands = -(-count // PHASES)
    centre = frequencies(bands, rate)[:, None, None]
    distance = torch.gradient(centre.flatten())[0].abs()[:, None, None]
    time = (torch.arange(length, dtype=torch.float64) - (length - 1) / 2) / rate
    # A Gaussian's spread in time is 1 / (2 pi) over that in frequency.
    spread = 2 * math.sqrt(2 * math.log(2)) / (2 * math.pi * OVERLAP * distance)
    bell = torch.exp(-0.5 * (time / spread) ** 2) * torch.hann_window(length, dtype=torch.float64)
    phase = torch.arange(PHASES, dtype=torch.float64)[:, None] * math.pi / 2
    wave = bell * torch.cos(2 * math.pi * centre * time + phase)  # (bands, phases, length)
    gain = (1 + (centre / SOFT_FROM) ** 2).sqrt()
    return (gain * wave / wave.norm(dim=-1, keepdim=True)).flatten(0, 1)[:count].float()


def frequencies(bands: int, rate: int) -> Tensor:
    """The middles of the bands in Hz, equally spaced in mel: float64 (bands,)."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (LOWEST, HIGHEST * rate))
    mel = torch.linspace(low, high, bands, dtype=torch.float64)
    return 700 * (10 ** (mel / 2595) - 1)
