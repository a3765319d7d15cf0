"""Gradient checkpointing: layers keep no activations, and run again in the backward pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pared.errors import InputError

# How diffusers and transformers say that a model can.
SUPPORT = ("_supports_gradient_checkpointing", "supports_gradient_checkpointing")
# transformers' name for turning it on, and what it was before.
ENABLE = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


def check_recomputes(model: Any) -> None:
    """Refuse gradient checkpointing for a model, or a class of models, that has none.

    Raises:
        InputError: it has none.
    """
    if not any(getattr(model, name, False) for name in SUPPORT):
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        raise InputError(f"{name} has no gradient checkpointing; leave gradient_checkpointing out.")


def recompute(model: Any, compiled: bool = False) -> None:
    """Turn gradient checkpointing on, in place.

    Args:
        model: of diffusers or transformers.
        compiled: whether the model will run through torch.compile, which leaves running statistics
            alone the second time by itself, and takes no contexts.

    Raises:
        InputError: the model has no gradient checkpointing.
    """
    check_recomputes(model)
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if not compiled:
        how["context_fn"] = partial(_contexts, model)
    next(getattr(model, name) for name in ENABLE if hasattr(model, name))(how)


def _contexts(model: Any) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Those of a layer's first run and of its second, as torch.utils.checkpoint takes them."""
    return nullcontext(), _statistics_kept(model)


@contextmanager
def _statistics_kept(model: Any) -> Iterator[None]:
    """Batch norms note every batch once, as they do where layers run once."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
