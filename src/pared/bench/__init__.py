"""Measuring: cost, time, memory and quality, each with its uncertainty.

`pared.bench` is this package, and also a verb: `pared.bench(pipe, {...})`, see `pared.bench.run`.
"""

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """A module that can be called.

    Importing any file of this folder makes Python set the attribute `bench` of `pared` to this
    package, over whatever stood there. Were the verb only a function of that name,
    `pared.bench(...)` would work or fail by what had been imported before; so the package answers
    the call itself.
    """

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """See `pared.bench.run.bench`, which is imported only now, since it needs torch."""
        from pared.bench.run import bench

        return bench(*args, **keywords)


sys.modules[__name__].__class__ = _CallableModule
