"""Training of a KL-regularised image autoencoder, the first stage of latent diffusion.

After Rombach et al. 2022 (arXiv 2112.10752): reconstruction plus a very weak pull of the posterior
to N(0, I). Departure: no LPIPS and no adversarial term, whose weights or balance a small offline
model can't have. A term on image gradients stands in for them: it notices blur, which a plain pixel
error forgives.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pared.objectives.noise import randn_like


class Autoencoding(nn.Module):
    """Absolute and squared error of pixels, error of their differences, weighted KL.

    Batch: `pixel_values` (batch, 3, height, width) in [-1, 1]. Model: diffusers `AutoencoderKL`.

    Args:
        kl: weight of the KL term, which is the mean over latent elements (the paper's 1e-6 goes
            with sums).
        gradient: weight of the error of horizontal and vertical differences.
        square: weight of the squared error. Absolute error alone is content with the median colour:
            a world of skin tones then loses its few green things.
    """

    def __init__(self, kl: float = 1e-4, gradient: float = 1.0, square: float = 5.0) -> None:
        super().__init__()
        self.kl, self.gradient, self.square = kl, gradient, square

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        pixels = batch["pixel_values"]
        # forward() of AutoencoderKL would hide the posterior, whose KL is needed.
        inner: Any = getattr(model, "module", model)
        posterior = inner.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * randn_like(mean, generator)
        reconstruction = inner.decode(latents).sample.float()
        error = reconstruction - pixels
        differences = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return {
            "pixels": error.abs().mean(),
            "square": self.square * error.square().mean(),
            "gradient": self.gradient * differences,
            "kl": self.kl * kl,
        }
