"""A diffusion that ends in a Gaussian of its condition instead of white noise.

Explicit Conditioning (arXiv 2503.17593): with y ~ N(mu(c), Sigma(c)), Sigma diagonal, in the place
of noise,

    z_t = alpha_t x + sigma_t y,    z_t | x, c ~ N(alpha_t x + sigma_t mu, sigma_t^2 Sigma).

mu and Sigma come from the given picture, whose autoencoder gives a Gaussian of its latents, and
from the prompt, through a small variational autoencoder. Ordinary diffusion is mu = 0, Sigma = 1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.nn.prompt_vae import PromptVAE, Size
from pared.objectives.noise import randn_like

Fusion = Literal["sum", "rms", "mean"]

# Where a denoiser keeps its conditional prior.
SITE = "conditional_prior"


@dataclass(frozen=True)
class Gaussian:
    """What a diffusion ends in: N(mean, std^2), independent in every element.

    Attributes:
        mean: mu, (batch, channels, height, width).
        std: the root of Sigma, likewise.
    """

    mean: Tensor
    std: Tensor

    def draw(self, generator: torch.Generator) -> Tensor:
        """y = mu + Sigma^(1/2) eps, with eps from a generator on the CPU."""
        return self.mean + self.std * randn_like(self.mean, generator)

    def only_where(self, given: Tensor) -> "Gaussian":
        """The same for the samples that are `given`, (batch,), and white noise for the others."""
        given = given.view(-1, 1, 1, 1)
        return Gaussian(self.mean * given, torch.where(given, self.std, 1.0))


def standard(like: Tensor) -> Gaussian:
    """White noise, the endpoint of ordinary diffusion, shaped like a tensor."""
    return Gaussian(torch.zeros_like(like), torch.ones_like(like))


def fuse(
    mu_i: Tensor, var_i: Tensor, mu_p: Tensor, var_p: Tensor, mode: Fusion
) -> tuple[Tensor, Tensor]:
    """One Gaussian from the picture's and the prompt's.

    "sum" is that of y_I + y_P, "rms" that of (y_I + y_P) / sqrt(2), which keeps a unit variance,
    and "mean" has the averages of means and variances. A product of both would be the picture's
    alone, whose variance is tiny.

    Args:
        mu_i: mean of the picture's latents.
        var_i: their variance.
        mu_p: mean of the prompt's map.
        var_p: its variance.
        mode: how.

    Returns:
        Mean and variance.
    """
    mu, var = mu_i + mu_p, var_i + var_p
    if mode == "sum":
        return mu, var
    return (mu / 2**0.5 if mode == "rms" else mu / 2), var / 2


def score(z: Tensor, x: Tensor, alpha: float, sigma: float, endpoint: Gaussian) -> Tensor:
    """Gradient in z of log N(z; alpha x + sigma mu, sigma^2 Sigma): -Sigma^(-1/2) eps / sigma."""
    return -(z - alpha * x - sigma * endpoint.mean) / (sigma * endpoint.std).square()


def transport_cost(x: Tensor, endpoint: Gaussian) -> Tensor:
    """E ||x - y||^2 = ||x - mu||^2 + tr Sigma of each sample, (batch,)."""
    return ((x - endpoint.mean).square() + endpoint.std.square()).flatten(1).sum(dim=1)


def pooled(condition: dict[str, Tensor]) -> Tensor:
    """One vector per prompt, (batch, width), from what a denoiser is given.

    It is the entry `pooled` where there is one (SDXL, SD3, FLUX). Of tokens with a `mask` it is
    their mean over the mask, which suits encoders of either direction (PixArt). Of tokens alone it
    is the last one: these come from CLIP, which is causal, so that the last token has read the
    whole prompt; it is the end token itself where the prompt fills its length, and stands behind it
    where it doesn't (SD 1 pads with end tokens).

    Raises:
        InputError: there are no tokens.
    """
    if "pooled" in condition:
        return condition["pooled"]
    if "text" not in condition:
        given = ", ".join(condition) or "nothing"
        raise InputError(f"a conditional prior needs a prompt, `text` or `pooled`; given: {given}.")
    text = condition["text"]
    if "mask" not in condition:
        return text[:, -1]
    mask = condition["mask"].to(text).unsqueeze(-1)
    return (text * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class ConditionalPrior(nn.Module):
    """From a given picture and a prompt to the Gaussian that the diffusion ends in.

    For latents of another size than its own, the prompt's maps of mean and variance are
    interpolated; the noise never is, so that it stays white.

    Args:
        width: of the pooled prompt.
        channels: of the latents.
        size: height and width of the latents that the prompt's maps are made for.
        fusion: see `fuse`.
        image_std: standard deviation of the picture's Gaussian; None takes the autoencoder's own.
        scale: factor of the fused standard deviation.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        size: Size,
        fusion: Fusion = "sum",
        image_std: float | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.prompt = PromptVAE(width, channels, size)
        self.fusion, self.image_std, self.scale = fusion, image_std, scale

    def forward(self, mean: Tensor, std: Tensor | None, condition: dict[str, Tensor]) -> Gaussian:
        """The endpoint for given pictures and prompts, in float32.

        Args:
            mean: of the pictures' latents, (batch, channels, height, width), scaled as they are.
            std: standard deviation of the same posterior on the same scale; not read with
                `image_std`.
            condition: what the denoiser is given.

        Raises:
            InputError: the standard deviation or the prompt is missing.
        """
        mu_p, var_p = self.of_prompt(condition, (mean.shape[-2], mean.shape[-1]))
        if self.image_std is not None:
            std = torch.full_like(mean, self.image_std)
        if std is None:
            raise InputError(
                "the standard deviation of the given picture's latents is missing; give it, or "
                "set image_std."
            )
        mu, var = fuse(mean.float(), std.float().square(), mu_p, var_p, self.fusion)
        return Gaussian(mu, self.scale * var.sqrt())

    def of_prompt(self, condition: dict[str, Tensor], size: Size) -> tuple[Tensor, Tensor]:
        """Mean and variance from the prompt alone, (batch, channels, *size), float32."""
        prompts = pooled(condition)
        maps = self.prompt.encode(prompts.to(self.prompt.expand.weight.dtype))
        mean, var = (each.float() for each in maps)
        if mean.shape[-2:] != size:
            mean, var = (_resized(each, size) for each in (mean, var))
        return mean, var


def _resized(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", antialias=True)


def prior_of(model: nn.Module) -> ConditionalPrior | None:
    """The conditional prior that a denoiser carries, if it carries one."""
    return getattr(anatomy.unwrap(model), SITE, None)


def reads_source(model: nn.Module) -> bool:
    """Whether a denoiser's input layer also takes the latents of a picture, behind the noised ones.

    Where it doesn't, `source` must be left out of what `Family.denoise` is given.
    """
    family = anatomy.of(model)
    layer = family.model.get_submodule(family.input_layer)
    read = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    config = family.config
    # Some models predict a variance too; those built to read a picture predict fewer channels.
    latents = min(config.in_channels, config.out_channels or config.in_channels)
    return bool(read > latents)
