"""How close images are to their references, pair by pair.

Images are floating point (batch, channels, height, width) in [0, 1], so every formula's range is 1.
Each measure returns one float64 figure per image (batch,); averaging, with its uncertainty, is the
caller's. Restoration papers measure luma without a border: compose with `luma` and `crop_border`.

PSNR and SSIM favour blur, so `sharpness` belongs beside them.
"""

import torch
from torch.nn import functional as F

from pared.bench.checks import image_pairs, images, pairs
from pared.errors import InputError

# SSIM of Wang et al. (2004): window, and constants K1 and K2 for range 1.
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def luma(x: torch.Tensor) -> torch.Tensor:
    """The luma Y of ITU-R BT.601 at full range, 0.299 R + 0.587 G + 0.114 B.

    Super-resolution papers that follow MATLAB use the studio range, 16/255 to 235/255; its PSNR is
    higher by 20 log10(255/219) = 1.32 dB.

    Args:
        x: RGB images (batch, 3, height, width) in [0, 1].

    Returns:
        Grey images (batch, 1, height, width) in [0, 1].
    """
    x = images(x)
    if x.shape[1] != 3:
        raise InputError(f"the images have {x.shape[1]} channels; luma needs 3, in order RGB.")
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device)
    return (x * weights[:, None, None]).sum(dim=1, keepdim=True)


def crop_border(x: torch.Tensor, pixels: int) -> torch.Tensor:
    """Cuts a border off images (batch, channels, height, width), `pixels` wide on every side."""
    height, width = x.shape[-2:]
    if not 0 <= 2 * pixels < min(height, width):
        raise InputError(
            f"a border of {pixels} pixels can't be cut off images of {height}x{width}; "
            "it must be at least 0 and leave something."
        )
    return x[..., pixels : height - pixels, pixels : width - pixels]


def psnr(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio for range 1, -10 log10 MSE; infinite for equal images.

    Args:
        x: Images (batch, channels, height, width) in [0, 1].
        reference: Images of the same shape.

    Returns:
        Decibels (batch,), higher is closer.
    """
    x, reference = image_pairs(x, reference)
    return -10 * torch.log10((x - reference).square().mean(dim=(1, 2, 3)))


def ssim(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity: 11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, range 1.

    Averaged over channels and over a window around every pixel, the border mirrored, as in
    torchmetrics. Wang et al. and pyiqa leave out windows that cross the border; on small images
    the two differ in the second digit.

    Args:
        x: Images (batch, channels, height, width) in [0, 1], at least 11 pixels on each side.
        reference: Images of the same shape.

    Returns:
        Similarity (batch,), 1 for equal images.
    """
    x, y = image_pairs(x, reference, smallest=WINDOW)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    # Rounding makes the variance of a flat patch slightly negative.
    variance_x = (_window_mean(x * x) - mean_x**2).clamp(min=0)
    variance_y = (_window_mean(y * y) - mean_y**2).clamp(min=0)
    covariance = _window_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _window_mean(x: torch.Tensor) -> torch.Tensor:
    """Gaussian-weighted mean around every pixel of (b, c, h, w), the border mirrored."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    planes = F.pad(x, [WINDOW // 2] * 4, mode="reflect").flatten(0, 1)[:, None]
    planes = F.conv2d(planes, weights[None, None, :, None])
    planes = F.conv2d(planes, weights[None, None, None, :])
    return planes.unflatten(0, x.shape[:2])[:, :, 0]


def cosine(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of each sample, taken as one long vector, with its reference.

    Args:
        x: Images, latents or features (batch, ...), in any range.
        reference: The same shape.

    Returns:
        Similarity (batch,) in [-1, 1]; NaN where a sample is all zeros, which points nowhere.
    """
    x, reference = (each.flatten(1) for each in pairs(x, reference))
    return (x * reference).sum(dim=1) / (x.norm(dim=1) * reference.norm(dim=1))


def relative_mse(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Squared error as a share of the reference's energy, ||x - r||^2 / ||r||^2.

    Args:
        x: Images, latents or features (batch, ...), in any range.
        reference: The same shape.

    Returns:
        Share (batch,), 0 for equal samples and 1 for all zeros; not finite where the reference is
        all zeros.
    """
    x, reference = (each.flatten(1) for each in pairs(x, reference))
    return (x - reference).square().sum(dim=1) / reference.square().sum(dim=1)


def sharpness(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Fine detail relative to the reference: the ratio of the energies of the Laplacian.

    1 is as sharp as the reference, less is blurred, more is noisy or over-sharpened. It asks how
    much detail there is, not whether it is the right detail: read it beside PSNR or SSIM.

    Args:
        x: Images (batch, channels, height, width) in [0, 1], at least 3 pixels on each side.
        reference: Images of the same shape.

    Returns:
        Ratio (batch,); not finite where the reference has no detail at all.
    """
    x, reference = image_pairs(x, reference, smallest=3)
    return _laplacian_energy(x) / _laplacian_energy(reference)


def _laplacian_energy(x: torch.Tensor) -> torch.Tensor:
    """Mean square of the four-neighbour Laplacian of images (b, c, h, w), per image (b,)."""
    centre = x[..., 1:-1, 1:-1]
    neighbours = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return (neighbours - 4 * centre).square().mean(dim=(1, 2, 3))
