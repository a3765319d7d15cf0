"""Detours: what runs in the place of a module's forward, and comes off again without a trace."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import MethodType
from typing import Any

from torch import nn

# What runs in a module's place: its own forward, then the call's arguments.
Around = Callable[..., Any]


class Detour:
    """The forward of a module while a run-time method goes around it.

    An object and not a closure, so that a deep copy of the module goes around its own forward.
    """

    # No dictionary: others would copy its entries onto what they wrap around a detour.
    __slots__ = ("__weakref__", "around", "own")

    def __init__(self, own: Callable[..., Any], around: Around) -> None:
        self.own = own
        self.around: Around | None = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.around is None:
            return self.own(*args, **kwargs)
        return self.around(self.own, *args, **kwargs)


def detour(module: nn.Module, around: Around, undo: ExitStack, within: bool = False) -> None:
    """Call `around(own forward, *args, **kwargs)` in the place of a module's forward.

    Detours of one module nest, the latest outermost unless it's to go `within` the others, and can
    be taken off in any order. They go inside of the hooks of accelerate and diffusers that move
    weights and inputs between devices, whichever was there first, and so stay when those are taken
    off or put on anew. Under any other wrapper a detour that was taken off stays as a mere passage.

    Args:
        module: what to go around.
        around: gets the forward as it was before; an object or a method of one, so that a copy of
            the module has a copy of it.
        undo: gets what takes the detour off.
        within: go around the module's own forward, inside of all other detours: for a method whose
            form of the module is what the others compute or leave out.
    """
    holder, name = _innermost(module)
    while within and isinstance(held := getattr(holder, name), Detour):
        holder, name = held, "own"
    ours = Detour(getattr(holder, name), around)
    setattr(holder, name, ours)

    def remove() -> None:
        ours.around = None
        for holder, name in _places(module):
            _close_up(holder, name)

    undo.callback(remove)


def _places(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where the forward of a module is held: by itself, or by hooks that were put over it."""
    yield module, "forward"
    yield module, "_old_forward"  # accelerate
    registry = getattr(module, "_diffusers_hook", None)
    for hook in getattr(registry, "_fn_refs", ()):
        yield from ((hook, "original_forward"), (hook, "forward"))


def _innermost(module: nn.Module) -> tuple[Any, str]:
    """The place whose forward is no hook's."""
    for holder, name in _places(module):
        held = getattr(holder, name, None)
        if held is not None and not isinstance(held, functools.partial):
            return holder, name
    return module, "forward"


def _close_up(holder: Any, name: str) -> None:
    """Take out the outermost detours of a place that nobody needs any more."""
    held = vars(holder).get(name)
    if not isinstance(held, Detour):
        return
    while isinstance(held, Detour) and held.around is None:
        held = held.own
    own = isinstance(holder, nn.Module) and MethodType(type(holder).forward, holder)
    if name == "forward" and held == own:
        del holder.forward
    else:
        setattr(holder, name, held)
