"""Generative models, pared down.

bill(pipe)                       where the cost goes
apply(pipe, TaylorSeer())        run-time methods, reversible
convert(model, EDiT())           surgery on the weights
heal(student, teacher=..., ...)  train what a conversion broke
save(model, folder), load(folder)
bench(pipe, {...})               gain and loss side by side
fit(pipe, latency=3)             the best run-time methods under a budget
with_tasks(pipe)                 pipe(..., task="edit", image=...)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that holds it. Methods are found through the registry.
_WHERE = {
    "InputError": "pared.errors",
    "Conversion": "pared.method",
    "RuntimeMethod": "pared.method",
    "apply": "pared.method",
    "convert": "pared.method",
    "parse": "pared.method",
    "save": "pared.checkpoint",
    "load": "pared.checkpoint",
    "heal": "pared.healing",
    "bill": "pared.bench.bill",
    "fit": "pared.bench.fit",
    "with_tasks": "pared.tasks.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import pared` itself stays instant."""
    if name == "bench":  # a package that can be called, see there
        return importlib.import_module("pared.bench")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if not name.startswith("_"):
        from pared.info import registry

        for record in registry().values():
            if record.cls == name:
                return record.load()
    raise AttributeError(f"module 'pared' has no attribute {name!r}")


def __dir__() -> list[str]:
    from pared.info import registry

    return sorted(
        ["bench", *_WHERE, *(record.cls for record in registry().values()), "__version__"]
    )
