"""Formulas of diffusion and flow models that know no network: levels of noise, steps, guidance.

Everything is written for a Gaussian path z_t = alpha_t x + sigma_t eps from data x to noise eps ~
N(0, I), and for the clean estimate, a network's guess of x from z_t. That covers
variance-preserving diffusion (alpha^2 + sigma^2 = 1) and flow matching (alpha = 1 - t, sigma = t)
alike.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """Signal and noise at one time of a path.

    Both may be of another type and on another device than the samples they scale: float64 on the
    CPU keeps the differences of neighbouring levels exact.

    Attributes:
        alpha: factor of the data, (batch,) or a scalar.
        sigma: factor of the noise, likewise.
    """

    alpha: Tensor
    sigma: Tensor


def scaled(factor: Tensor, x: Tensor) -> Tensor:
    """Each sample of `x` (batch, ...) times its own factor, (batch,) or a scalar."""
    return factor.to(x).view(-1, *[1] * (x.ndim - 1)) * x


def noised(x: Tensor, noise: Tensor, t: Level) -> Tensor:
    """z_t = alpha_t x + sigma_t eps, shaped like `x` (batch, ...)."""
    return scaled(t.alpha, x) + scaled(t.sigma, noise)


# Steps --------------------------------------------------------------------------------------------


def ddim_step(z: Tensor, x: Tensor, t: Level, s: Level) -> Tensor:
    """D(z, x, t -> s) = alpha_s x + sigma_s (z - alpha_t x) / sigma_t, either way in time.

    The deterministic step of Song et al. 2020 (arXiv 2010.02502, equation 12 with no noise).

    Args:
        z: point at t, (batch, ...).
        x: clean estimate there, shaped like `z`.
        t: level of `z`; its sigma is above 0.
        s: level to go to.

    Returns:
        The point at s.
    """
    return scaled(s.sigma / t.sigma, z) + scaled(_share_of_data(t, s), x)


def _share_of_data(t: Level, s: Level) -> Tensor:
    """Factor of the clean estimate in a step t -> s: alpha_s - (sigma_s / sigma_t) alpha_t."""
    return s.alpha - s.sigma / t.sigma * t.alpha


def one_of_two(first: Tensor, second: Tensor, t: Level, middle: Level, end: Level) -> Tensor:
    """The clean estimate with which one step goes where two steps went.

    Solves D(z, x~, t -> t'') = D(D(z, x1, t -> t'), x2, t' -> t'') for x~, the target of
    progressive distillation (Salimans and Ho 2022, arXiv 2202.00512, appendix G):

        x~ = (z'' - (sigma'' / sigma) z) / (alpha'' - (sigma'' / sigma) alpha)

    For tiny steps that is one small difference over another. Put in the two steps, and z drops out:
    x~ = x2 + share (x1 - x2), where only the share, a number per sample, has to be computed
    precisely.

    Args:
        first: x1, the clean estimate at t, (batch, ...).
        second: x2, the clean estimate at t', shaped like `first`.
        t: level at the start; its sigma is above 0.
        middle: level at t', likewise.
        end: level at t''; at sigma = 0 the result is exactly x2.

    Returns:
        x~, shaped like `first`.
    """
    share = end.sigma / middle.sigma * _share_of_data(t, middle) / _share_of_data(t, end)
    return second + scaled(share, first - second)


def renoised(z: Tensor, noise: Tensor, k: Level, s: Level) -> Tensor:
    """A sample of the path at s given its point at k, which has less noise.

    z_s = (alpha_s / alpha_k) z_k + sigma_{s|k} eps, where sigma_{s|k}^2 = (1 - exp(lambda_s -
    lambda_k)) sigma_s^2 = sigma_s^2 - (alpha_s / alpha_k)^2 sigma_k^2 and lambda = log(alpha^2 /
    sigma^2).

    Args:
        z: point at k, (batch, ...).
        noise: eps, shaped like `z`.
        k: level of `z`; its alpha is above 0.
        s: level with at least as much noise.
    """
    kept = s.alpha / k.alpha
    added = (s.sigma**2 - (kept * k.sigma) ** 2).clamp(min=0).sqrt()
    return scaled(kept, z) + scaled(added, noise)


# Guidance -----------------------------------------------------------------------------------------


def guided(conditional: Tensor, unconditional: Tensor, w: Tensor) -> Tensor:
    """(1 + w) x_c - w x_u: classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    Clean estimate, noise, v and flow are affine in each other at one point, so it may be applied to
    any of them. What diffusers calls guidance_scale is 1 + w.

    Args:
        conditional: x_c, (batch, ...).
        unconditional: x_u, shaped like `conditional`.
        w: weight, (batch,) or a scalar; at 0 the result is exactly x_c.
    """
    return conditional + scaled(w, conditional - unconditional)


def guidance_features(w: Tensor, channels: int) -> Tensor:
    """Sines and cosines of 1000 w, (batch, channels), in float32.

    The numbers of diffusers' `get_guidance_scale_embedding`, to the bit: a network trained on these
    is fed those by stock pipelines, and 1000 w is large enough for rounding to matter.

    Args:
        w: guidance weight, (batch,).
        channels: even.
    """
    half = channels // 2
    step = torch.full((), 10000.0, device=w.device).log() / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=w.device) * -step)
    angles = (w.float() * 1000.0)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
