"""The types of a model's weights around a training: float32 within, their own again behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(*models: nn.Module) -> Iterator[None]:
    """Within the context models are in float32; behind it every weight in its own type again."""
    before = [types_of(model) for model in models]
    for model in models:
        nn.Module.to(model, torch.float32)  # diffusers' own `to` would warn
    try:
        yield
    finally:
        for model, types in zip(models, before, strict=True):
            retype(model, types)


def types_of(model: nn.Module) -> dict[str, torch.dtype]:
    """The type of every weight and buffer of a model that is of real numbers."""
    return {name: tensor.dtype for name, tensor in _floating(model)}


def retype(
    model: nn.Module, types: dict[str, torch.dtype], others: torch.dtype | None = None
) -> None:
    """Put weights and buffers into their types.

    Args:
        model: is changed in place.
        types: by name.
        others: of what isn't among them; None: as they are.
    """
    for name, tensor in _floating(model):
        tensor.data = tensor.data.to(types.get(name, others or tensor.dtype))


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = chain(model.named_parameters(), model.named_buffers())
    return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
