"""Where and in what type that lies which run-time methods keep from step to step.

The clock keeps for all of them: everything as it is, unless `pared.apply` is told to keep in main
memory, no more than a budget, or in a coarser type. Then floating point tensors are put away when
they are kept, and come back, to their device and in their type, when they are asked for; what comes
back is working memory, and is held by nobody. Whole numbers (of patches, say) are few, and stay.
"""

import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from pared.errors import InputError
from pared.nn.linear_attention import clipped

# Types to keep in, as torch names them.
Coarse = Literal["float16", "bfloat16", "float32"]

PREFIXES = ("", "k", "M", "G", "T")


def keeping(
    offload: str | None = None, budget: int | str | None = None, dtype: str | None = None
) -> "Keeping | None":
    """How to keep, from the arguments of `pared.apply`; None: everything as it is.

    Raises:
        InputError: one of them can't be.
    """
    if offload not in (None, "cpu"):
        raise InputError(
            f"offload={offload!r} can't be; give 'cpu', which is main memory, or leave it out."
        )
    if dtype is not None and dtype not in get_args(Coarse):
        given = ", ".join(map(repr, get_args(Coarse)))
        raise InputError(f"dtype={dtype!r} can't be to keep in; give one of {given}.")
    if offload is budget is dtype is None:
        return None
    size = None if budget is None else size_of(budget)
    return Keeping(cast(Any, offload), size, None if dtype is None else getattr(torch, dtype))


def size_of(text: int | str) -> int:
    """Bytes that a number or a text names: 2000000, "2 MB" or "500MiB".

    Raises:
        InputError: it names none.
    """
    pattern = rf"(\d+(?:\.\d+)?) *([{''.join(PREFIXES)}]?)(i?)B"
    if isinstance(text, int) and text > 0:
        return text
    found = re.fullmatch(pattern, text) if isinstance(text, str) else None
    if found is None or not float(found[1]):
        raise InputError(
            f"budget={text!r} is no size; give bytes as a number, or a text such as '2GB' or "
            "'500MiB'."
        )
    base = 1024 if found[3] else 1000
    return round(float(found[1]) * base ** PREFIXES.index(found[2]))


def spelled(size: int) -> str:
    """Bytes as people write them: 1234567 is 1.23 MB."""
    power = min((len(str(size)) - 1) // 3, len(PREFIXES) - 1)
    return f"{size / 1000**power:.3g} {PREFIXES[power]}B"


@dataclass(eq=False)
class Keeping:
    """How the methods of one `pared.apply` keep.

    Attributes:
        offload: "cpu" puts into main memory what the budget leaves no room for.
        budget: bytes to be kept on the device, by all methods and threads together; None is
            without end, and nothing at all where there is `offload`.
        dtype: to keep in what has a finer type.
        clocks: that keep so.
    """

    offload: Literal["cpu"] | None = None
    budget: int | None = None
    dtype: torch.dtype | None = None
    clocks: int = 0
    _stores: weakref.WeakValueDictionary[int, "Store"] = field(
        default_factory=weakref.WeakValueDictionary
    )
    _lock: Any = field(default_factory=threading.RLock)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Keeping":
        return Keeping(self.offload, self.budget, self.dtype)

    @property
    def room(self) -> int | None:
        """Bytes that may lie on the device."""
        return 0 if self.offload and self.budget is None else self.budget

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the context, clocks that are made keep so."""
        before = _AT_WORK.set(self)
        try:
            yield
        finally:
            _AT_WORK.reset(before)

    def joins(self, store: "Store") -> None:
        """Count a store in."""
        with self._lock:
            self._stores[id(store)] = store

    def take(self, tensors: list[Tensor]) -> bool:
        """Whether tensors are to be put into main memory.

        Raises:
            InputError: the budget has no room for them, and main memory wasn't allowed.
        """
        if self.room is None:
            return False
        new = self.size(tensors)
        with self._lock:
            need = new + sum(store.on_device() for store in [*self._stores.values()])
        if need <= self.room or new == 0:
            return False
        if self.offload:
            return True
        raise InputError(
            f"what is kept for reuse would take {spelled(need)} of the device at least, and the "
            f"budget is {spelled(self.room)}; give a larger budget, offload='cpu', which puts into "
            "main memory what has no room, or a coarser dtype, such as 'bfloat16'."
        )

    def type_of(self, x: Tensor) -> torch.dtype:
        """The type that a tensor is kept in."""
        finer = self.dtype is not None and x.element_size() > self.dtype.itemsize
        return self.dtype if finer and self.dtype is not None else x.dtype

    def size(self, tensors: list[Tensor]) -> int:
        """Bytes that floating point tensors will take."""
        cast = [x for x in tensors if self.type_of(x) != x.dtype]
        asis = [x for x in tensors if self.type_of(x) == x.dtype]
        return sum(x.numel() * self.type_of(x).itemsize for x in cast) + stored_bytes(asis)


_AT_WORK: ContextVar[Keeping | None] = ContextVar("keeping", default=None)


def at_work() -> Keeping | None:
    """How a clock that is made now is to keep; None: everything as it is."""
    found = _AT_WORK.get()
    if found is not None:
        found.clocks += 1
    return found


class Lying(NamedTuple):
    """What lies under one key of a store.

    Attributes:
        leaves: tensors, put away or as they were, and what else there is.
        origins: device and type of each floating point tensor; None for all others.
        spec: how it was nested.
        away: whether the floating point tensors are in main memory.
        size: bytes that they take.
    """

    leaves: list[Any]
    origins: list[tuple[torch.device, torch.dtype] | None]
    spec: TreeSpec
    away: bool
    size: int


class Store(dict[Any, Any]):
    """A dictionary that puts away the floating point tensors in its values, however nested.

    Getting a value by its key brings them back. `items` and `values` bring nothing: they show what
    lies there, as it lies. Dictionaries put in become stores; other values are left as they are.
    """

    def __init__(self, keeping: Keeping) -> None:
        super().__init__()
        self.keeping = keeping
        keeping.joins(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().pop(key, None)
        if isinstance(value, dict):
            nested = Store(self.keeping)
            nested.update(value)
            super().__setitem__(key, nested)
            return
        leaves, spec = tree_flatten(value)
        some = [x for x in leaves if _is_floating(x)]
        if not some:
            super().__setitem__(key, value)
            return
        away, size = self.keeping.take(some), self.keeping.size(some)
        origins = [(x.device, x.dtype) if _is_floating(x) else None for x in leaves]
        put = [self._put(x, away) if _is_floating(x) else x for x in leaves]
        super().__setitem__(key, Lying(put, origins, spec, away, size))

    def __getitem__(self, key: Any) -> Any:
        return _back(super().__getitem__(key))

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def pop(self, key: Any, *default: Any) -> Any:
        return _back(super().pop(key, *default))

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *others: Any, **more: Any) -> None:
        for key, value in dict(*others, **more).items():
            self[key] = value

    def __ior__(self, other: Any) -> "Store":  # type: ignore[misc]
        self.update(other)
        return self

    def items(self) -> Any:
        return [(key, _as_it_lies(held)) for key, held in super().items()]

    def values(self) -> Any:
        return [_as_it_lies(held) for held in self.raw()]

    def raw(self) -> list[Any]:
        """What there is under the keys: something lying, a store, or anything else."""
        return [*super().values()]

    def on_device(self) -> int:
        """Bytes of the floating point tensors that were left on their device."""
        lying = (held for held in self.raw() if isinstance(held, Lying))
        return sum(held.size for held in lying if not held.away)

    def _put(self, x: Tensor, away: bool) -> Tensor:
        dtype, kept = self.keeping.type_of(x), x.detach()
        kept = kept if dtype == x.dtype else clipped(kept, dtype)
        # Into memory from where a device can fetch it without the host's waiting.
        return kept.to("cpu", non_blocking=x.is_cuda) if away else kept


def _back(held: Any) -> Any:
    """A value with its tensors as they came."""
    if not isinstance(held, Lying):
        return held
    leaves = [
        x if origin is None else x.to(*origin, non_blocking=origin[0].type == "cuda")
        for x, origin in zip(held.leaves, held.origins, strict=True)
    ]
    return tree_unflatten(leaves, held.spec)


def _as_it_lies(held: Any) -> Any:
    return tree_unflatten(held.leaves, held.spec) if isinstance(held, Lying) else held


def _is_floating(given: Any) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point()


# Bytes --------------------------------------------------------------------------------------------


def held_bytes(kept: Any) -> int:
    """Bytes that all tensors in nested dictionaries, lists and tuples keep from being freed.

    A view holds all of what it is a view of; what several share counts once.
    """
    return sum(bytes_apart(kept))


def bytes_apart(kept: Any) -> tuple[int, int]:
    """The same on the device, and in main memory as far as it was put there."""
    tensors = [*_tensors(kept)]
    here = [x for x, away in tensors if not away]
    return stored_bytes(here), stored_bytes([x for x, away in tensors if away])


def _tensors(kept: Any) -> Iterator[tuple[Tensor, bool]]:
    """All tensors, and whether each was put away."""
    for leaf in tree_leaves(kept):
        if isinstance(leaf, Store):
            for held in leaf.raw():
                yield from _lying(held) if isinstance(held, Lying) else _tensors(held)
        elif isinstance(leaf, Tensor):
            yield leaf, False


def _lying(held: Lying) -> Iterator[tuple[Tensor, bool]]:
    for x, origin in zip(held.leaves, held.origins, strict=True):
        if isinstance(x, Tensor):
            yield x, held.away and origin is not None


def stored_bytes(tensors: list[Tensor]) -> int:
    """Bytes of what tensors, or those that they are views of, are stored in."""
    stores = [x.untyped_storage() for x in tensors]
    # By identity, since on the meta device all addresses are zero.
    return sum({store._cdata: store.nbytes() for store in stores}.values())
