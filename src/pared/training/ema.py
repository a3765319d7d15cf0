"""Exponential moving average of the weights that train."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """Shadow copies of `model`'s trainable parameters, in float32.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that an average over a short run
    isn't dominated by the starting weights. Works on plain, DDP and sharded parameters alike,
    because it touches each parameter only through its own local storage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.shadows = [p.detach().clone().float() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the shadows towards the current weights; `step` counts optimizer steps from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in self.parameters]
        torch._foreach_lerp_(self.shadows, current, 1 - decay)

    @torch.no_grad()
    def write_to_model(self) -> None:
        """Overwrite the trained weights by their average, for good."""
        for parameter, shadow in zip(self.parameters, self.shadows, strict=True):
            parameter.copy_(shadow)

    @torch.no_grad()
    def read_from_model(self) -> None:
        """Overwrite the average by the current weights (used when a checkpoint is read)."""
        for parameter, shadow in zip(self.parameters, self.shadows, strict=True):
            shadow.copy_(parameter)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the model carries the averaged weights."""
        kept = [p.detach().clone() for p in self.parameters]
        self.write_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)
