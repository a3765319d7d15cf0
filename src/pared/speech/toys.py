"""Toy encoders and the frames they hear, for the checks of methods."""

from typing import Any

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import presets
from pared.method import Conversion, convert


def toy(name: str = "toy:conformer", *methods: Conversion, **config: Any) -> nn.Module:
    """A toy recogniser in eval mode, converted, its weights stirred.

    Fresh attentions attend to all alike, and fresh norms and biases take no part.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = presets.get(name).main.make(**config)
        if methods:
            convert(model, *methods)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder in a recogniser."""
    return model.get_submodule(anatomy.of(model).encoder)


@torch.no_grad()
def encoded(model: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """What the encoder makes of frames, (batch, frames, width)."""
    return encoder_of(model)(x.clone(), attention_mask=valid).last_hidden_state


def frames(batch: int = 2, time: int = 30, width: int = 32) -> Tensor:
    """Random frames."""
    return torch.randn(batch, time, width, generator=torch.Generator().manual_seed(0))
