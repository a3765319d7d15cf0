"""Log-mel frames in the place of the convolution that reads a speech encoder's samples.

SummaryMixing wav2vec 2.0 (arXiv 2407.13377) reads log-mel frames, and two convolutions behind them
make latents of 20 ms, where wav2vec 2.0 has seven over samples. The first convolution of the stock
model becomes a fixed spectrum with as many bands as it has channels, through windows as long and as
far apart as its own; the convolutions behind it stay. With 80 channels, windows of 400 samples
every 160, and two layers (512 channels, kernels 3, strides 2 and 1) this is the paper's extractor.

Implemented from the paper. Windows are centred on every 160th sample, with zeros beyond both ends
of an utterance, so that a second has 101 frames and 48 latents; padding counts as zeros. The model
counts its frames accordingly, by transformers' own formula for a sound that is one window longer.
Every band is brought to mean 0 and variance 1 over the utterance's real frames; magnitudes more
than 80 dB below the loudest count as that. Chosen here: a Hann window, triangles as high as each
other, and longer spectra than windows where the lowest band would have no point otherwise; with the
paper's sizes it has one. Since frames are normalised over what is given, a long recording that is
read in pieces gives other frames than one that is read at once. Not verified: any gain over learned
filters.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family
from pared.anatomy.speech import AudioEncoder, Frames
from pared.info import Info
from pared.method import Claim, Conversion
from pared.nn.linear_attention import full_precision

INFO = Info(
    slug="mel-front",
    title="Log-mel frames in the place of learned filters",
    arxiv="2407.13377",
    venue="Interspeech 2024",
    kind="conversion",
    families=("conformer", "wav2vec2"),
    training=True,
    trained_by="recipe",
    exact=False,
    maturity="faithful",
    summary="log-mel frames in the place of the first convolution over samples",
    cls="MelFront",
)

RATE = 16_000  # samples per second that these encoders read
DEPTH = 80.0  # dB below the loudest
SILENCE = 1e-10  # power
HIGHEST = 2595 * math.log10(1 + RATE / 2 / 700)  # mel


class MelFront(Conversion):
    """log mel(|FFT(window x)|^2), normalised per utterance and band."""

    info = INFO

    def claims(self, family: Family) -> list[Claim]:
        if not isinstance(family, AudioEncoder):
            raise family.refuse(self.info.slug, "it doesn't read samples itself.")
        return [Claim(family.front, "replaces")]

    def convert(self, model: nn.Module) -> None:
        family: Any = anatomy.of(model)
        conv = next(m for m in model.get_submodule(family.front).modules() if _is_first(m))
        frames = Frames()
        reader = model.get_submodule(family.reader)
        reader.register_forward_pre_hook(frames, with_kwargs=True)
        mel = LogMel(conv.out_channels, conv.kernel_size[0], conv.stride[0], frames)
        family.replace(family.front, mel)
        family.lengthen(2 * mel.beyond)

    def trainable(self, family: Family) -> tuple[str, ...]:
        return ("*",)  # nothing is left of what it replaces, and all behind it hears other frames


def _is_first(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and module.in_channels == 1


class LogMel(nn.Module):
    """Normalised log-mel frames of sounds at 16 kHz. It has no weights.

    Args:
        bands: how many.
        window: samples that a frame hears.
        hop: samples from one frame to the next.
        frames: tells which samples of the running call are real; None: all are.
    """

    def __init__(self, bands: int, window: int, hop: int, frames: Frames | None = None) -> None:
        super().__init__()
        self.bands, self.window, self.hop, self.frames = bands, window, hop, frames

    @property
    def beyond(self) -> int:
        """Samples that the first window reaches beyond its end of the sound, and the last one."""
        return self.window // 2

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, samples) to (batch, bands, frames); frames of padding are 0."""
        sound, valid = x[:, 0].float(), None if self.frames is None else self.frames.valid
        if valid is not None:
            sound = sound.masked_fill(valid == 0, 0)
        y = self.decibels(sound)
        real = y.new_ones(*y.shape[:2], 1) if valid is None else self._real(valid, y)
        return normalised(limited(y, real), real).mT.to(x.dtype)

    def decibels(self, x: Tensor) -> Tensor:
        """Power in every band: float32 (batch, frames, bands).

        Args:
            x: (batch, samples).
        """
        around = F.pad(x.float(), (self.beyond, self.beyond))
        windows = around.unfold(-1, self.window, self.hop)  # (batch, frames, window)
        points = max(self.window, least_points(self.bands))
        bell = torch.hann_window(self.window, device=x.device)
        power = torch.fft.rfft(windows * bell, points).abs().square()
        with full_precision(x):
            mel = power @ filters(self.bands, points, x.device)
        return 10 * mel.clamp(min=SILENCE).log10()

    def _real(self, valid: Tensor, y: Tensor) -> Tensor:
        """1 for frames that an utterance alone has too, else 0: (batch, frames, 1), as y is."""
        samples = valid.sum(dim=1, keepdim=True)
        frames = (samples + 2 * self.beyond - self.window) // self.hop + 1
        return (torch.arange(y.shape[1], device=y.device) < frames).unsqueeze(-1).to(y.dtype)


def limited(y: Tensor, real: Tensor) -> Tensor:
    """Decibels y (batch, frames, bands), at most 80 below the loudest of the real frames."""
    loudest = y.masked_fill(real == 0, -torch.inf).amax(dim=(1, 2), keepdim=True)
    return torch.maximum(y, loudest - DEPTH)


def normalised(y: Tensor, real: Tensor) -> Tensor:
    """y (batch, frames, bands) with mean 0 and variance 1 over real frames; others are 0.

    Args:
        y: see above.
        real: 1 for real frames, else 0, (batch, frames, 1).
    """
    count = real.sum(dim=1, keepdim=True).clamp(min=1)
    y = (y - (real * y).sum(dim=1, keepdim=True) / count) * real
    variance = y.square().sum(dim=1, keepdim=True) / count
    return y * (variance + 1e-5).rsqrt()


def filters(bands: int, points: int, device: torch.device | None = None) -> Tensor:
    """Triangles over the bins of a spectrum, equally spaced in mel: (points / 2 + 1, bands)."""
    bins = torch.linspace(0, RATE / 2, points // 2 + 1, device=device)
    edges = corners(bands, device)
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)


def corners(bands: int, device: torch.device | None = None) -> Tensor:
    """Where triangles begin, peak and end, in Hz: (bands + 2,)."""
    mel = torch.linspace(0, HIGHEST, bands + 2, device=device)
    return 700 * (10 ** (mel / 2595) - 1)


def least_points(bands: int) -> int:
    """Points of a spectrum with which the lowest band, the narrowest, has one."""
    end = 700 * (10 ** (2 * HIGHEST / (bands + 1) / 2595) - 1)  # in Hz; the band begins at 0
    return 2 * math.ceil(RATE / end / 2) + 2
