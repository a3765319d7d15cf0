"""A small variational autoencoder between a pooled prompt and a map shaped like latents."""

from math import ceil, gcd, log2

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The coarsest map has sides of at most 8 and 16 channels.
BASE, BASE_CHANNELS = 8, 16

# Bounds of the logarithm of a variance.
LOGVAR = (-10.0, 4.0)

Size = tuple[int, int]


class PromptVAE(nn.Module):
    """q(u | p) = N(mu(p), Sigma(p)) with u shaped like latents, and a decoder of p from u.

    A linear map to 16 x 8 x 8, then residual stages that double the sides; the decoder is their
    mirror image. For latents of 64 x 64 there are three stages, of 128, 64 and 32 channels; smaller
    latents have fewer, and narrower, larger ones more. It starts as N(0, 1) for every prompt.

    Args:
        width: of the pooled prompt.
        channels: of the latents.
        size: height and width of the latents.

    Attributes:
        center: mean of the pooled prompts that it was fitted to, (width,).
        spread: their standard deviation, likewise.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, width: int, channels: int, size: Size) -> None:
        super().__init__()
        self.sizes = sizes(*size)
        stages = len(self.sizes) - 1
        widths = [min(128, 32 * 2 ** (stages - 1 - i)) for i in range(stages)]
        ups = [BASE_CHANNELS, *widths]
        base = BASE_CHANNELS * self.sizes[0][0] * self.sizes[0][1]
        # Prompts of one corpus are much alike; what tells them apart is what they differ in.
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.expand = nn.Linear(width, base)
        self.up = nn.ModuleList(map(Residual, ups, ups[1:]))
        self.head = nn.Conv2d(ups[-1], 2 * channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)
        self.stem = nn.Conv2d(channels, ups[-1], 3, padding=1)
        downs = ups[::-1]
        self.down = nn.ModuleList(map(Residual, downs, downs[1:]))
        self.contract = nn.Linear(base, width)

    def encode(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, each (batch, channels, *size), of prompts (batch, width)."""
        x = self.expand(self.normalised(pooled)).unflatten(1, (BASE_CHANNELS, *self.sizes[0]))
        for stage, size in zip(self.up, self.sizes[1:], strict=True):
            x = stage(F.interpolate(x, size=size))
        mean, logvar = self.head(x).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR).exp()

    def decode(self, u: Tensor) -> Tensor:
        """Normalised prompts (batch, width) from maps (batch, channels, *size)."""
        x = self.stem(u)
        for stage, size in zip(self.down, self.sizes[-2::-1], strict=True):
            x = stage(F.adaptive_avg_pool2d(x, size))
        return self.contract(x.flatten(1))

    def normalised(self, pooled: Tensor) -> Tensor:
        """Prompts (batch, width) with the mean and spread of the corpus taken out."""
        return (pooled - self.center) / self.spread


class Residual(nn.Module):
    """x + two convolutions of it, each behind GroupNorm and SiLU; a 1 x 1 changes the width."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(gcd(8, channels), channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(gcd(8, out), out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, out, height, width)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def sizes(height: int, width: int) -> list[Size]:
    """The sides of the maps from the coarsest to the latents', each about twice those before."""
    stages = max(1, ceil(log2(max(height, width) / BASE)))
    return [(ceil(height / 2**k), ceil(width / 2**k)) for k in range(stages, -1, -1)]


def kl_to_standard(mean: Tensor, var: Tensor) -> Tensor:
    """KL of N(mean, var) from N(0, 1), summed over all but the batch, (batch,)."""
    return 0.5 * (mean.square() + var - 1 - var.log()).flatten(1).sum(dim=1)
