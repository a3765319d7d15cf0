"""Frames, spectra and back: a window that moves by half its length, causal.

A frame is two neighbouring hops of samples. The window's square and its own shifted by a hop add up
to 1, so that the same window takes a signal apart and puts it together again.
"""

import torch
from torch import Tensor

# Keeps the gradient of |Y|^c finite in silence; far below the noise of 16-bit samples.
FLOOR = 1e-10


def root_hann(size: int) -> Tensor:
    """The square root of a periodic Hann window, (size,), on the CPU."""
    angle = torch.pi * torch.arange(size, dtype=torch.float64, device="cpu") / size
    return angle.sin().float()


def analysis(hops: Tensor, window: Tensor) -> Tensor:
    """The spectra of all frames.

    Args:
        hops: (batch, frames + 1, hop); frame t is hops t and t + 1.
        window: (2 hop,).

    Returns:
        (batch, frames, hop + 1, 2), real and imaginary parts.
    """
    frames = torch.cat([hops[:, :-1], hops[:, 1:]], dim=-1)
    return torch.view_as_real(torch.fft.rfft(frames * window.to(frames)))


def synthesis(spectra: Tensor, window: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Overlap-add: the hops that are complete once all these frames are known.

    Args:
        spectra: as `analysis` gives them.
        window: (2 hop,).
        before: second half of the frame before the first, (batch, hop).

    Returns:
        The hops, (batch, frames, hop): number t is where frames t - 1 and t overlap. And the second
        half of the last frame, (batch, hop), for the next call.
    """
    frames = torch.fft.irfft(torch.view_as_complex(spectra)) * window.to(spectra)
    first, second = frames.chunk(2, dim=-1)
    return first + torch.cat([before[:, None], second[:, :-1]], dim=1), second[:, -1]


def power(spectra: Tensor) -> Tensor:
    """|Y|^2, (batch, frames, F)."""
    return spectra.square().sum(dim=-1)


def compressed(power: Tensor, exponent: float) -> Tensor:
    """|Y|^c from |Y|^2."""
    # Clamped, not added to: exporters leave out what adds next to nothing.
    return power.clamp(min=FLOOR) ** (exponent / 2)


def magnitude_masked(logits: Tensor, spectra: Tensor) -> Tensor:
    """M Y with M = sigmoid(logits) in [0, 1]; logits (batch, frames, F)."""
    return logits.sigmoid().unsqueeze(-1) * spectra


# Bound of each part of a complex mask.
COMPLEX_BOUND = 5.0


def complex_masked(logits: Tensor, spectra: Tensor) -> Tensor:
    """M Y with the complex ratio mask M = 5 tanh(logits); logits (batch, frames, 2 F)."""
    m_re, m_im = (COMPLEX_BOUND * logits.tanh()).chunk(2, dim=-1)
    y_re, y_im = spectra.unbind(dim=-1)
    return torch.stack([m_re * y_re - m_im * y_im, m_re * y_im + m_im * y_re], dim=-1)
