"""Caches under one call after the other: of another size, of another number of steps, and off.

A cache may work in one call and fail in the next, by what it kept of the first. `peers.tried` finds
out whether it works at all; here it is found out whether it lasts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pared.bench.peers import Finding, attempt, left_behind, said_by
from pared.method import RuntimeMethod, apply

Call = Callable[..., Tensor]
Made = Callable[[], tuple[Any, Call]]  # a pipeline, and what calls it
Calls = Mapping[str, Mapping[str, Any]]

# The end of a row.
OFF = "taken off"


def examined(cache: RuntimeMethod, made: Made, others: Calls) -> Finding:
    """Find out whether a cache works in a row of calls: each must give what it gives by itself.

    The row is a first call, the others, and the first again. Then the cache is taken off, and the
    pipeline must be what it was. Behind an error the row goes on with a fresh pipeline, so that
    everything that fails is found.

    Args:
        cache: a peer, or a run-time method of pared.
        made: makes a fresh pipeline and what calls it, for pictures or latents. It is made anew for
            every beginning, so that nothing inherits what a cache left.
        others: arguments for calls that differ from the first, by what is special to them.
    """
    plain, first, found = attempt(cache, *made())
    if found.outcome != "works" or first is None:
        return found
    row: Calls = {**others, "first call again": {}}
    wanted, failed = {"first call again": first}, dict[str, str]()
    for name, call in others.items():
        try:
            wanted[name] = _alone(cache, made, call)
        # Whatever goes wrong in another library is what is asked for.
        except Exception as error:
            failed[name] = f"by itself {said_by(error)}"
    rest = {name: call for name, call in row.items() if name in wanted}
    failed |= _in_a_row(cache, made, rest, wanted, plain)
    names = tuple(name for name in (*row, OFF) if name in failed)
    detail = "; ".join(f"{name}: {failed[name]}" for name in names)
    return Finding("works once", detail, names) if names else found


def _alone(cache: RuntimeMethod, made: Made, call: Mapping[str, Any]) -> Tensor:
    """One call of a fresh pipeline."""
    pipeline, run = made()
    with apply(pipeline, cache):
        return run(**call)


def _in_a_row(
    cache: RuntimeMethod, made: Made, row: Calls, wanted: Mapping[str, Tensor], plain: Tensor
) -> dict[str, str]:
    """What fails in a row behind a first call, and what is wrong."""
    left, failed = list(row), dict[str, str]()
    while left:
        pipeline, run = made()
        name = left.pop(0)
        try:
            with apply(pipeline, cache):
                run()
                while name != OFF:
                    if not torch.equal(run(**row[name]), wanted[name]):
                        failed[name] = "another picture than by itself"
                    name = left.pop(0) if left else OFF
        except Exception as error:
            failed[name] = said_by(error)
        if trace := left_behind(run, plain):
            failed[OFF] = trace
    return failed
