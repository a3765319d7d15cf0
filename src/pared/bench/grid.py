"""Every way of running a model that its run-time methods offer: the points of a frontier."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, cast

from pared import anatomy, info, method
from pared.errors import InputError
from pared.method import RuntimeMethod

# Methods joined in one way of running.
Stack = tuple[str, ...]


def settings(family: str, slugs: Sequence[str] = ()) -> list[str]:
    """The specs in the grids of all run-time methods that serve a family.

    Args:
        family: name of a family.
        slugs: of these methods only, where given.

    Raises:
        InputError: one of the slugs is no run-time method that serves the family.
    """
    serving = {
        record.slug: record
        for record in info.registry().values()
        if record.kind == "runtime" and family in record.families and record.grid
    }
    for slug in slugs:
        if slug not in serving:
            raise InputError(
                f"{slug!r} is no run-time method for a {family} model; choose among "
                f"{', '.join(serving) or 'none'}."
            )
    return [
        f"{record.slug}:{point}" if point else record.slug
        for record in serving.values()
        if not slugs or record.slug in slugs
        for point in record.grid
    ]


def attachable(target: Any, specs: Sequence[str], pairs: bool = False) -> list[Stack]:
    """The specs that can be attached to a pipeline, by themselves and in pairs.

    Args:
        target: the pipeline, or a bare denoiser.
        specs: of run-time methods.
        pairs: also two of them together, of different methods.
    """
    alone = [(spec,) for spec in specs if _attaches(target, (spec,))]
    if not pairs:
        return [*alone]
    two = [
        (a, b)
        for (a,), (b,) in combinations(alone, 2)
        if a.partition(":")[0] != b.partition(":")[0] and _attaches(target, (a, b))
    ]
    return [*alone, *two]


def methods_of(stack: Stack) -> tuple[RuntimeMethod, ...]:
    """The methods of a stack."""
    return tuple(cast(RuntimeMethod, method.parse(spec)) for spec in stack)


def _attaches(target: Any, stack: Stack) -> bool:
    try:
        method.apply(target, *methods_of(stack)).remove()
    except InputError:
        return False
    return True


def family_of(target: Any) -> str:
    """Name of the family of a pipeline's denoiser."""
    return anatomy.of(method.denoiser(target)).name
