"""What a running call costs in multiply-adds, and on what the denoiser spends them.

`pared.bench.costs` counts a model on the meta device; this counts real runs of whole pipelines,
with all that run-time methods skip in them, and keeps nothing of what it sees.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pared import anatomy
from pared.bench import costs
from pared.errors import InputError

# What runs outside of the denoiser: text encoders and the decoding of latents.
OUTSIDE = "encoders and decoder"


@dataclass
class Count:
    """What one run of a pipeline or a denoiser cost.

    Attributes:
        macs: multiply-adds by kind: those of `pared.bench.costs.KINDS`, and `OUTSIDE`.
        calls: how often the denoiser was called.
        passes: how many samples went through it, all calls together.
        arguments: positional and keyword arguments of the denoiser's first call.
    """

    macs: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    passes: int = 0
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def total(self) -> int:
        """Multiply-adds of the whole run."""
        return sum(self.macs.values())

    @property
    def per_pass(self) -> float:
        """Multiply-adds of the denoiser for one sample, on average over its passes."""
        return (self.total - self.macs.get(OUTSIDE, 0)) / max(1, self.passes)


def flop_counter() -> FlopCounterMode:
    """torch's counter, which also counts the attention kernel of the CPU (torch leaves it out)."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops})


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def count(run: Callable[[], Any], model: nn.Module) -> Count:
    """Counts a run, in which `model` is the denoiser.

    Args:
        run: what to count; runs once.
        model: the denoiser, called any number of times.

    Returns:
        The count.
    """
    found = Count()
    meter = _Meter(model)
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(_watch(found), with_kwargs=True).remove)
        meter.install(hooks)
        with torch.no_grad(), meter.counter:
            run()
            meter.read()
    found.macs = {kind: macs for kind in (*costs.KINDS, OUTSIDE) if (macs := meter.macs[kind])}
    return found


def _watch(found: Count) -> Callable[..., None]:
    """A hook that takes down the calls of the denoiser."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if found.arguments is None:
            found.arguments = tree_map(_copy, (args, kwargs))
        found.calls += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        # The latents come first in every family, as a map or as tokens.
        found.passes += next((len(t) for t in tensors if t.ndim > 2), 1)

    return before


def _copy(leaf: Any) -> Any:
    # A pipeline is free to go on working in the tensors that it passed.
    return leaf.clone() if torch.is_tensor(leaf) else leaf


class _Meter:
    """Hands out what was counted since the last reading to whichever module was running."""

    def __init__(self, model: nn.Module) -> None:
        self.counter = flop_counter()
        self.macs: dict[str, int] = defaultdict(int)
        self._model = anatomy.unwrap(model)
        self._sorting: costs.BySite | costs.Whole
        try:
            self._sorting = costs.BySite(anatomy.of(self._model))
        except InputError:  # what pared can't read has a total, but no parts
            self._sorting = costs.Whole()
        self._running: list[str | None] = [None]  # paths in the denoiser; None is outside of it
        self._read: dict[Any, int] = defaultdict(int)

    def install(self, hooks: ExitStack) -> None:
        """Lets the meter see every module of the denoiser being entered and left."""
        for path, module in self._model.named_modules():
            before = module.register_forward_pre_hook(self._entering(path), prepend=True)
            hooks.callback(before.remove)
            hooks.callback(module.register_forward_hook(self._leave).remove)

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self.read()
            self._running.append(path)

        return enter

    def _leave(self, *_: Any) -> None:
        self.read()
        self._running.pop()

    def read(self) -> None:
        """Books the operations since the last reading on the running module."""
        path = self._running[-1]
        for operation, flops in self.counter.flop_counts["Global"].items():
            fresh, self._read[operation] = flops - self._read[operation], flops
            if not fresh:
                continue
            convolution = "conv" in str(operation)
            kind = OUTSIDE if path is None else self._sorting.of_work(path, convolution)
            self.macs[kind] += fresh // 2
