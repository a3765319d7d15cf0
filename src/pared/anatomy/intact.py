"""Whether what a conversion put into a model is still in force there.

Other libraries replace attention processors and switch adapters without a word. The model would
then compute something else than its stack of conversions says; a hook on the model refuses that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from pared.anatomy.base import part_of
from pared.errors import InputError

if TYPE_CHECKING:
    from pared.method import Conversion


class Intact(ABC):
    """A forward pre-hook of a model that refuses calls where a conversion does nothing any more.

    Copies of a model copy it along; torch.compile takes it into its graph.

    Args:
        method: the conversion.
        paths: dotted paths of the modules that it works in.

    Attributes:
        on: whether it looks; not while the conversion is merged.
    """

    def __init__(self, method: Conversion, paths: Sequence[str]) -> None:
        self.method, self.paths, self.on = method, tuple(paths), True

    def watch(self, model: nn.Module) -> None:
        """Look at every call of `model` from now on."""
        model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: tuple) -> None:
        for path in self.paths if self.on else ():
            if not self.holds(part_of(model, path)):
                raise InputError(self.fault(path, part_of(model, path)))

    @abstractmethod
    def holds(self, module: Any) -> bool:
        """Whether the conversion is in force in a module; None where there is none any more."""

    @abstractmethod
    def fault(self, path: str, module: Any) -> str:
        """The sentence for one in which it isn't."""


def watching(model: nn.Module) -> list[Intact]:
    """All that look at a model's calls."""
    return [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Intact)]


def require_intact(model: nn.Module) -> None:
    """Refuse a model that its conversions aren't in force in, as its next call would.

    Raises:
        InputError: something was replaced or switched off since.
    """
    for look in watching(model):
        look(model, ())
