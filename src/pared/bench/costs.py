"""Multiply-adds, parameters and activations of one call of a model, by what they are spent on.

The arithmetic is torch's own count (`torch.utils.flop_counter`), which sees every matrix product
and convolution and nothing else; it's read whenever a module is entered or left, so each operation
belongs to the innermost module that runs. Two FLOPs are one multiply-add (MAC).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pared.anatomy import Family, Site

CORE = "attention core"
PROJECTIONS = "attention projections"
CROSS = "cross-attention"
FEED_FORWARD = "feed-forward"
CONVOLUTIONS = "convolutions"
MODULATION = "modulation"
OTHER = "other"
# In the order of the tables.
KINDS = (CORE, PROJECTIONS, CROSS, FEED_FORWARD, CONVOLUTIONS, MODULATION, OTHER)

_OF_SITE = {
    "self_attention": PROJECTIONS,
    "joint_attention": PROJECTIONS,
    "cross_attention": CROSS,
    "feed_forward": FEED_FORWARD,
    "modulation": MODULATION,
    "norm": OTHER,
}


@dataclass
class Cost:
    """What one kind of work takes in one call.

    Attributes:
        macs: multiply-adds in matrix products and convolutions.
        parameters: how many; embedding tables count here and have no multiply-adds.
        weight_bytes: bytes of the parameters and of the buffers (position tables).
        activation_bytes: bytes of the tensors that enter or leave the leaf modules, each counted
            once: about what training keeps. The map of a softmax attention isn't among them, since
            fused kernels never write it.
        largest_bytes: the largest of these tensors.
    """

    macs: int = 0
    parameters: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    largest_bytes: int = 0


class Whole:
    """All work is of one kind: for models that are one line of the bill (autoencoder, encoders)."""

    def of_module(self, path: str) -> str:
        return OTHER

    def of_work(self, path: str, convolution: bool) -> str:
        return OTHER

    def attention(self, path: str) -> str | None:
        return None


class BySite:
    """The kind of each module of a denoiser, from the sites of its anatomy.

    Convolutions are a kind of their own wherever they are, in attentions too, except in a
    feed-forward, which stays whole. Linear layers of a block outside its sites are feed-forward as
    well: FLUX's one-stream blocks have theirs there.
    """

    def __init__(self, family: Family) -> None:
        self._modules = dict(family.model.named_modules())
        self._sites = {site.path: site for site in family.sites()}
        self._blocks = {block.path for block in family.blocks}

    def of_module(self, path: str) -> str:
        """The kind that a module's parameters and activations count under."""
        site = self._site(path)
        kind = OTHER if site is None else _OF_SITE[site.kind]
        module = self._modules[path]
        if isinstance(module, nn.modules.conv._ConvNd) and kind != FEED_FORWARD:
            return CONVOLUTIONS
        if site is None and isinstance(module, nn.Linear) and self._in_block(path):
            return FEED_FORWARD
        return kind

    def of_work(self, path: str, convolution: bool) -> str:
        """The kind of an operation that runs directly in a module.

        Args:
            path: of the module.
            convolution: whether the operation is one (a matrix product otherwise).
        """
        kind = self.of_module(path)
        if convolution and kind != FEED_FORWARD:
            return CONVOLUTIONS
        return CORE if kind == PROJECTIONS and not _has_matrix(self._modules[path]) else kind

    def attention(self, path: str) -> str | None:
        """Path of the self- or joint attention that a module belongs to."""
        site = self._site(path)
        return site.path if site is not None and _OF_SITE[site.kind] == PROJECTIONS else None

    def _site(self, path: str) -> Site | None:
        return next((self._sites[p] for p in _upwards(path) if p in self._sites), None)

    def _in_block(self, path: str) -> bool:
        return any(p in self._blocks for p in _upwards(path))


def count(model: nn.Module, sorting: BySite | Whole, call: Callable[[], Any]) -> dict[str, Cost]:
    """Count a call of a model.

    Args:
        model: on the meta device, as a rule (the activations of a real one are all kept meanwhile).
        sorting: says which kind each module is of.
        call: runs the model once.

    Returns:
        The cost of every kind that the model has.
    """
    meter = _Meter(sorting)
    _weigh(model, sorting, meter.costs)
    with torch.no_grad(), meter.counter, _watched(model, meter):
        call()
        meter.read()
    return {kind: meter.costs[kind] for kind in KINDS if meter.costs[kind] != Cost()}


class _Meter:
    """Hands out what was counted since the last reading to whoever was running."""

    def __init__(self, sorting: BySite | Whole) -> None:
        self.sorting = sorting
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self.counter = FlopCounterMode(display=False)
        self._running = [""]
        self._read: dict[Any, int] = defaultdict(int)
        self._mixed: set[str | None] = set()
        # Kept to the end: a storage that is freed could lend its identity to another.
        self._seen: dict[int, Tensor] = {}

    def read(self) -> None:
        """Book the operations since the last reading on the running module."""
        path = self._running[-1]
        for operation, flops in self.counter.flop_counts["Global"].items():
            fresh, self._read[operation] = flops - self._read[operation], flops
            if fresh:
                kind = self.sorting.of_work(path, "conv" in str(operation))
                self.costs[kind].macs += fresh // 2
                if kind == CORE:
                    self._mixed.add(self.sorting.attention(path))

    def enter(self, path: str, leaf: bool, given: Any) -> None:
        self.read()
        if leaf:
            # What comes into a layer out of a finished mixing of tokens is the mixing's result.
            mixed = self.sorting.attention(path) in self._mixed
            self._keep(CORE if mixed else self.sorting.of_module(path), given)
        self._running.append(path)

    def leave(self, path: str, leaf: bool, result: Any) -> None:
        self.read()
        self._running.pop()
        if leaf:
            self._keep(self.sorting.of_module(path), result)

    def _keep(self, kind: str, values: Any) -> None:
        """Book the tensors that weren't there before."""
        cost = self.costs[kind]
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = tensor
                cost.activation_bytes += storage.nbytes()
                cost.largest_bytes = max(cost.largest_bytes, storage.nbytes())


@contextmanager
def _watched(model: nn.Module, meter: _Meter) -> Iterator[None]:
    """Let the meter see every module of a model being entered and left."""
    hooks = [hook for path, module in model.named_modules() for hook in _watch(module, path, meter)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watch(module: nn.Module, path: str, meter: _Meter) -> list[Any]:
    leaf = not any(True for _ in module.children())

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        meter.enter(path, leaf, (args, kwargs))

    def leave(_: nn.Module, args: tuple, result: Any) -> None:
        meter.leave(path, leaf, result)

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        module.register_forward_hook(leave),
    ]


def _weigh(model: nn.Module, sorting: BySite | Whole, costs: dict[str, Cost]) -> None:
    """Book every parameter and buffer once, on the module that owns it."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        cost = costs[sorting.of_module(path)]
        for owned in (module._parameters, module._buffers):
            for tensor in owned.values():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                cost.parameters += tensor.numel() if owned is module._parameters else 0
                cost.weight_bytes += tensor.numel() * tensor.element_size()


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by weights of its own; a product of others mixes tokens."""
    lists = [m for m in module.children() if isinstance(m, nn.ParameterList | nn.ParameterDict)]
    return any(p.ndim > 1 for m in (module, *lists) for p in m.parameters(recurse=False))


def _upwards(path: str) -> Iterator[str]:
    """A dotted path, then its ancestors."""
    while path:
        yield path
        path = path.rpartition(".")[0]
