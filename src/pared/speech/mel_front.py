"""Log-mel frames in the place of the convolution that reads a speech encoder's samples.

SummaryMixing wav2vec 2.0 (arXiv 2407.13377) reads log-mel frames, and two convolutions behind them
make latents of 20 ms, where wav2vec 2.0 has seven over samples. The first convolution of the stock
model becomes a fixed spectrum with as many bands as it has channels, through windows as long and as
far apart as its own; the convolutions behind it stay. With 80 channels, windows of 400 samples
every 160, and two layers (512 channels, kernels 3, strides 2 and 1) this is the paper's extractor.

Implemented from the paper. Every band is brought to mean 0 and variance 1 over the utterance's real
frames; magnitudes more than 80 dB below the loudest count as that. Departures: windows lie where
the convolution's did, none reaches over the ends, so that transformers' count of frames stays right
and padding is heard by none; a second has 98 frames and 46 latents, where windows centred as in the
paper's give 101 and 48. Chosen here: spectra of 1024 points, since those of 400 leave the lowest
bands without any. Not verified: any gain over learned filters.
"""

import math
from typing import Any

import torch
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
    exact=False,
    maturity="faithful",
    summary="log-mel frames in the place of the first convolution over samples",
    cls="MelFront",
)

RATE = 16_000  # samples per second that these encoders read
POINTS = 1024  # of a spectrum, at least
DEPTH = 80.0  # dB below the loudest
SILENCE = 1e-10  # power


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

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, samples) to (batch, bands, frames)."""
        return self._normalised(self.decibels(x[:, 0])).mT.to(x.dtype)

    def decibels(self, x: Tensor) -> Tensor:
        """Power in every band, at most 80 dB below the loudest: float32 (batch, frames, bands).

        Args:
            x: (batch, samples).
        """
        windows = x.float().unfold(-1, self.window, self.hop)  # (batch, frames, window)
        points = max(POINTS, 2 ** math.ceil(math.log2(self.window)))
        bell = torch.hann_window(self.window, device=x.device)
        power = torch.fft.rfft(windows * bell, points).abs().square()
        with full_precision(x):
            mel = power @ filters(self.bands, points, x.device)
        decibel = 10 * mel.clamp(min=SILENCE).log10()
        loudest = decibel.amax(dim=(1, 2), keepdim=True)
        return torch.maximum(decibel, loudest - DEPTH)

    def _normalised(self, y: Tensor) -> Tensor:
        """y (batch, frames, bands) with mean 0 and variance 1 over real frames; others are 0."""
        samples = None if self.frames is None else self.frames.valid
        if samples is None:
            real = y.new_ones(y.shape[:2])
        else:
            # A frame is real where its last sample is.
            real = samples[:, self.window - 1 :: self.hop][:, : y.shape[1]].to(y.dtype)
        real = real.unsqueeze(-1)
        count = real.sum(dim=1, keepdim=True).clamp(min=1)
        y = (y - (real * y).sum(dim=1, keepdim=True) / count) * real
        variance = y.square().sum(dim=1, keepdim=True) / count
        return y * (variance + 1e-5).rsqrt()


def filters(bands: int, points: int, device: torch.device | None = None) -> Tensor:
    """Triangles over the bins of a spectrum, equally spaced in mel: (points / 2 + 1, bands)."""
    bins = torch.linspace(0, RATE / 2, points // 2 + 1, device=device)
    highest = 2595 * math.log10(1 + RATE / 2 / 700)
    mel = torch.linspace(0, highest, bands + 2, device=device)
    corners = 700 * (10 ** (mel / 2595) - 1)
    rise = (bins[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[2:] - bins[:, None]) / (corners[2:] - corners[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)
