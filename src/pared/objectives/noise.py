"""Random numbers that are the same on every device, because the CPU draws them."""

import torch
from torch import Tensor


def randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers from a CPU generator, of the shape, type and place of `x`."""
    # Pinned memory is copied without waiting for what the accelerator still has to do.
    noise = torch.randn(x.shape, generator=generator, pin_memory=x.is_cuda)
    return noise.to(x, non_blocking=True)
