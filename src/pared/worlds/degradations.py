"""Degraded pictures, as restoration is trained on: two rounds of blur, resizing, noise and JPEG.

After Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833), Section 3: a photo that was taken, edited,
sent and sent again is modelled by a second round, and ringing by sinc filters. `Degradation()` has
the paper's chances and ranges. What it leaves open is chosen: everything is drawn uniformly within
its range, cutoffs of sinc filters from [pi/3, pi], and pictures continue past their border as they
end there, so that a kernel may be wider than the picture.

`MILD` is for small pictures that hold all their detail in a few pixels, such as emoji at 64 x 64:
the paper's ranges, made for 256 x 256 cuttings from photos, leave nothing of those to be restored.
"""

import io
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.errors import InputError
from pared.worlds.draws import Draw

Range = tuple[float, float]

# (isotropic, shape) of the six kinds of blur kernel, in the paper's order.
KERNELS = (
    (True, "gaussian"), (False, "gaussian"),
    (True, "generalised"), (False, "generalised"),
    (True, "plateau"), (False, "plateau"),
)  # fmt: skip
SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
RESIZING = ("area", "bilinear", "bicubic")


@dataclass(frozen=True)
class Round:
    """One round: blur, resize, noise, JPEG.

    Attributes:
        blur: chance that there is a blur.
        sinc: chance that the blur is a sinc filter.
        kernels: chances of `KERNELS` where it isn't.
        sigma: width of the blur, in pixels.
        beta_generalised: exponent of generalised Gaussian kernels; 1 is a Gaussian.
        beta_plateau: exponent of plateau-shaped kernels.
        resize: chances to enlarge, to shrink, and to keep the size.
        factor: least and greatest factor of the size.
        gaussian: chance that the noise is Gaussian; it is Poisson's otherwise.
        noise: standard deviation of Gaussian noise, of 255.
        poisson: scale of Poisson noise.
        grey: chance that the noise is the same in all channels.
        jpeg: quality, from 0 to 100.
    """

    blur: float = 1.0
    sinc: float = 0.1
    kernels: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sigma: Range = (0.2, 3.0)
    beta_generalised: Range = (0.5, 4.0)
    beta_plateau: Range = (1.0, 2.0)
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)
    factor: Range = (0.15, 1.5)
    gaussian: float = 0.5
    noise: Range = (1.0, 30.0)
    poisson: Range = (0.05, 3.0)
    grey: float = 0.4
    jpeg: tuple[int, int] = (30, 95)


@dataclass(frozen=True)
class Degradation:
    """Both rounds, and the sinc filter before or after the last JPEG.

    Attributes:
        first: round at full size.
        second: round about the size that comes out.
        final_sinc: chance of the last sinc filter.
    """

    first: Round = Round()
    second: Round = Round(
        blur=0.8, sigma=(0.2, 1.5), resize=(0.3, 0.4, 0.3), factor=(0.3, 1.2), noise=(1.0, 25.0),
        poisson=(0.05, 2.5),
    )  # fmt: skip
    final_sinc: float = 0.8


MILD = Degradation(
    Round(sigma=(0.2, 0.8), factor=(0.75, 1.5), noise=(1.0, 8.0), poisson=(0.05, 1.0),
          jpeg=(60, 95)),
    Round(blur=0.4, sigma=(0.2, 0.5), resize=(0.3, 0.4, 0.3), factor=(0.9, 1.2), noise=(1.0, 5.0),
          poisson=(0.05, 0.5), jpeg=(70, 95)),
    final_sinc=0.2,
)  # fmt: skip


def degrade(
    images: Tensor,
    generator: torch.Generator,
    scale: int = 4,
    settings: Degradation = Degradation(),
) -> Tensor:
    """Small, blurred, noisy versions of pictures, each degraded in its own way.

    Args:
        images: uint8, (count, 3, height, width).
        generator: source of all randomness (CPU).
        scale: how many times smaller what comes out is; 1 keeps the size.
        settings: chances and ranges.

    Returns:
        uint8, (count, 3, height / scale, width / scale).

    Raises:
        InputError: the pictures have another shape or type, or don't divide by `scale`.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(
            f"the pictures are {images.dtype} of shape {tuple(images.shape)}; they must be uint8 "
            "(count, 3, height, width)."
        )
    height, width = images.shape[-2:]
    if scale < 1 or height % scale or width % scale:
        raise InputError(
            f"pictures of {height} x {width} can't be made {scale} times smaller; give a scale of "
            "at least 1 that divides both."
        )
    small = images.new_empty(len(images), 3, height // scale, width // scale)
    for image, out in zip(images, small, strict=True):
        out[:] = _bytes(_degraded(image[None] / 255, scale, settings, Draw(generator)))[0]
    return small


def enlarge(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures brought to (height, width) by bicubic interpolation; uint8 (count, 3, ...) both."""
    return _bytes(_resized(images / 255, size, "bicubic"))


def _degraded(image: Tensor, scale: int, settings: Degradation, draw: Draw) -> Tensor:
    """One picture (1, 3, height, width) in [0, 1], degraded."""
    height, width = image.shape[-2:]
    size = height // scale, width // scale
    x = _round(image, (height, width), settings.first, draw)
    x = _jpeg(x, settings.first, draw)
    x = _round(x, size, settings.second, draw)
    last_jpeg_first = draw.chance(0.5)
    if last_jpeg_first:
        x = _jpeg(x, settings.second, draw)
    x = _resized(x, size, draw.one(RESIZING))
    if draw.chance(settings.final_sinc):
        x = _filtered(x, _sinc(draw)).clamp(0, 1)
    return x if last_jpeg_first else _jpeg(x, settings.second, draw)


def _round(x: Tensor, size: tuple[int, int], settings: Round, draw: Draw) -> Tensor:
    """Blur, resize relative to `size`, noise; in [0, 1]."""
    if draw.chance(settings.blur):
        x = _filtered(x, _sinc(draw) if draw.chance(settings.sinc) else _blur(settings, draw))
    low, high = settings.factor
    ranges = ((1.0, high), (low, 1.0), (1.0, 1.0))
    factor = draw.uniform(*ranges[draw.of(settings.resize)])
    x = _resized(x, (round(size[0] * factor), round(size[1] * factor)), draw.one(RESIZING))
    return (x + _noise(x.clamp(0, 1), settings, draw)).clamp(0, 1)


def _blur(settings: Round, draw: Draw) -> Tensor:
    """A normalised kernel (size, size); the paper's Equations 2 to 4, and its plateau shape."""
    isotropic, shape = KERNELS[draw.of(settings.kernels)]
    sigma = torch.tensor([draw.uniform(*settings.sigma), draw.uniform(*settings.sigma)])
    if isotropic:
        sigma[1] = sigma[0]
    angle = draw.uniform(-math.pi, math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = _offsets(draw.one(SIZES))
    # C^T Sigma^-1 C: the offset C in the axes of the ellipse, each in units of its sigma.
    squared = ((cos * u + sin * v) / sigma[0]) ** 2 + ((cos * v - sin * u) / sigma[1]) ** 2
    if shape == "gaussian":
        kernel = torch.exp(-squared / 2)
    elif shape == "generalised":
        kernel = torch.exp(-(squared ** draw.uniform(*settings.beta_generalised)) / 2)
    else:
        kernel = 1 / (1 + squared ** draw.uniform(*settings.beta_plateau))
    return kernel / kernel.sum()


def _sinc(draw: Draw) -> Tensor:
    """A circular low-pass filter (size, size) that rings; Equation 7."""
    cutoff = draw.uniform(math.pi / 3, math.pi)
    u, v = _offsets(draw.one(SIZES))
    radius = torch.sqrt(u**2 + v**2)
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[radius == 0] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def _offsets(size: int) -> tuple[Tensor, Tensor]:
    """Distances from the middle of a kernel, along rows and along columns, (size, size) each."""
    line = torch.arange(size) - float(size // 2)
    return line[:, None].expand(size, size), line[None, :].expand(size, size)


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of (1, 3, height, width) under one kernel."""
    planes = F.pad(x, [len(kernel) // 2] * 4, mode="replicate").transpose(0, 1)
    return F.conv2d(planes, kernel[None, None]).transpose(0, 1)


def _resized(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    size = max(1, size[0]), max(1, size[1])
    return F.interpolate(x, size, mode=mode).clamp(0, 1) if x.shape[-2:] != size else x


def _noise(x: Tensor, settings: Round, draw: Draw) -> Tensor:
    """Noise for a picture (1, 3, height, width) in [0, 1]."""
    gaussian, grey = draw.chance(settings.gaussian), draw.chance(settings.grey)
    light = x.mean(dim=1, keepdim=True) if grey else x
    if gaussian:
        noise = torch.randn(light.shape, generator=draw.generator)
        return noise * draw.uniform(*settings.noise) / 255
    # Counted photons: each of the 255 levels is one.
    counted = torch.poisson(255 * light, generator=draw.generator) / 255
    return (counted - light) * draw.uniform(*settings.poisson)


def _jpeg(x: Tensor, settings: Round, draw: Draw) -> Tensor:
    """A picture (1, 3, height, width) in [0, 1], compressed and opened again."""
    import numpy as np
    from PIL import Image

    quality = round(draw.uniform(*settings.jpeg))
    stored = io.BytesIO()
    Image.fromarray(_bytes(x)[0].permute(1, 2, 0).numpy()).save(stored, "JPEG", quality=quality)
    with Image.open(stored) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def _bytes(x: Tensor) -> Tensor:
    return (255 * x).round().clamp(0, 255).to(torch.uint8)
