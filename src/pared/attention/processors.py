"""What all of pared's attention processors are, whatever they mix, and how to tell them."""

from typing import Any

from torch import nn

from pared.anatomy import Grid
from pared.anatomy.intact import Intact
from pared.errors import InputError


class _Made(type):
    """Keeps processors from being made out of nothing.

    So diffusers renews all processors of a model when an IP-Adapter comes or goes.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            raise InputError(
                f"a {cls.__name__} has settings and weights of its own and can't be made anew, as "
                "diffusers does where an IP-Adapter is loaded or unloaded; load it before the "
                "conversion, and open the model again to be rid of it."
            )
        return super().__call__(*args, **kwargs)


class AttentionProcessor(nn.Module, metaclass=_Made):
    """An attention processor with weights, in the form that diffusers calls.

    Args:
        grid: of the tokens that it mixes.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid


class Mixing(Intact):
    """Refuses calls of a model in which somebody replaced one of our processors."""

    def holds(self, module: Any) -> bool:
        return isinstance(getattr(module, "processor", None), AttentionProcessor)

    def fault(self, path: str, module: Any) -> str:
        return (
            f"{self.method.info.slug} does nothing in {path} any more, where a "
            f"{type(getattr(module, 'processor', None)).__name__} replaced its attention processor "
            "(attention slicing, xformers, fused projections or an IP-Adapter, say); open the "
            "model again and leave that out."
        )
