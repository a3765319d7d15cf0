"""Where things are inside a model. `of(model)` answers; one file per family knows."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from pared.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from pared.anatomy.base import Block, Family, Site, SiteKind
    from pared.anatomy.denoiser import Denoiser, Grid

__all__ = ["Block", "Denoiser", "Family", "Grid", "Site", "SiteKind", "families", "of", "unwrap"]

_WHERE = dict.fromkeys(("Block", "Family", "Site", "SiteKind"), "base")
_WHERE |= dict.fromkeys(("Denoiser", "Grid"), "denoiser")


def __getattr__(name: str):
    # The classes are fetched when asked for: torch takes seconds to import, and a list of presets
    # must not wait for it.
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def families() -> dict[str, type[Family]]:
    """Every family, by the class names it reads. A new file in this folder is found by itself."""
    from pared.anatomy.base import Family

    found: dict[str, type[Family]] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name == "presets":
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            # Those of a whole kind are abstract.
            known = isinstance(value, type) and issubclass(value, Family)
            if known and not inspect.isabstract(value):
                found |= dict.fromkeys(value.classes, value)
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DDP, torch.compile and peft."""
    from torch import nn

    while True:
        if hasattr(model, "get_base_model"):
            model = cast(Any, model).get_base_model()
            continue
        inner = getattr(model, "_orig_mod", None)
        if inner is None:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def of(model: nn.Module) -> Family:
    """The anatomy of a model.

    Raises:
        InputError: no family reads this class; the message names those that are read.
    """
    inner = unwrap(model)
    for cls in type(inner).__mro__:
        if cls.__name__ in families():
            return families()[cls.__name__](inner)
    known = ", ".join(sorted(families()))
    raise InputError(f"pared can't read a {type(inner).__name__}; it reads {known}.")
