"""What a call costs by arms of a speech bench: in turns, in memory, and by length of utterances.

By length the arms take turns, too, each in a process of its own: what disturbs the machine for a
while disturbs all of them at one length, and not one of them at all lengths.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import record
import torch
from torch import nn

from pared.bench import host, scaling
from pared.bench.timing import BUSY_LIMIT, DRIFT_LIMIT, Timings, peak_memory
from pared.training.loop import freeze_all_but

# A length in seconds, what a call takes: "seconds" and "MiB"; and "cores" that others kept busy.
Point = dict[str, float]
# Calls that a time is the median of: so few at least, so many if they take no longer than this.
FEWEST, MOST, ENOUGH = 3, 5, 10.0


def add_options(parser: argparse.ArgumentParser, lengths: Sequence[float], floor: float) -> None:
    """Let a command take what `by_length` asks for."""
    parser.add_argument("--lengths", type=float, nargs="+", default=lengths, help="in seconds")
    parser.add_argument("--floor", type=float, default=floor, help="length that exponents begin at")
    half = psutil.virtual_memory().total // 2**31
    parser.add_argument("--gigabytes", type=int, default=half, help="that a length may take")


class Step:
    """A step of training as a recipe makes it, on one batch: forward, backward, clipping, AdamW.

    Args:
        model: is trained.
        objective: of it.
        batch: on the CPU.
        settings: of the recipe, for what trains, precision and clipping; in float16, which the CPU
            has no use for, it is in float32.
    """

    def __init__(
        self, model: nn.Module, objective: nn.Module, batch: dict[str, Any], settings: Any
    ) -> None:
        self.model, self.objective, self.batch = model.train(), objective, batch
        self.settings = settings
        freeze_all_but(model, settings.trainable)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained)

    def __call__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bf16"):
            sum(self.objective(self.model, self.batch, generator).values()).backward()
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def rows_of(timings: Timings, memory: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """A row for each arm, the first of which is the base; `memory` in bytes."""
    rows: list[dict[str, Any]] = [
        {
            "attention": arm,
            "s per step": float(f"{timing.median:.3g}"),
            "base / this, s": round(timing.ratio, 3),
            "10 to 90 %": f"{timing.ratio_low:.3f} to {timing.ratio_high:.3f}",
            "note": "; ".join(timings.verdict.notes) or "none",
        }
        for arm, timing in timings.items()
    ]
    for row in rows if memory else ():
        bytes_ = memory[row["attention"]]
        row["MiB at the peak"] = round(bytes_ / 2**20)
        row["base / this, MiB"] = round(memory[rows[0]["attention"]] / bytes_, 3)
    return rows


# Length -----------------------------------------------------------------------------------------


def point_of(call: Callable[[], object], length: float) -> Point | None:
    """What a call takes; None where it doesn't fit the memory. Libraries have been called before.

    Args:
        call: what is measured.
        length: of its utterance in seconds.
    """
    try:
        bytes_ = peak_memory(call)
        durations: list[float] = []
        neighbours = host.Neighbours()
        while len(durations) < FEWEST or (len(durations) < MOST and sum(durations) < ENOUGH):
            begun = time.perf_counter()
            call()
            durations.append(time.perf_counter() - begun)
        cores = neighbours.cores()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        return None
    mib = max(bytes_, 1) / 2**20
    seconds = statistics.median(durations)
    return {"length": length, "seconds": seconds, "MiB": mib, "cores": cores}


def by_length(
    point_at: Callable[[argparse.Namespace, str, float], Point | None],
    options: argparse.Namespace,
    arms: Sequence[str],
    call: str,
    by: str,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Tables and figures of time and memory against the length of an utterance.

    Args:
        point_at: measures one length, in a process of its own.
        options: see `add_options`; handed on.
        arms: that are compared; the first is measured once more at the end.
        call: what is measured, in words.
        by: what length, in words.
    """
    measure = partial(alone, point_at, options, gigabytes=options.gigabytes)
    found = in_turns(measure, arms, sorted(options.lengths))
    over = shared(found, options.floor)
    again = measure(arms[0], over[0]) if over else None
    tables, figures = {}, {}
    for name, key in (("time", "seconds"), ("memory", "MiB")):
        rows = [
            {"attention": arm} | length_row(points, key, over, sorted(options.lengths))
            for arm, points in found.items()
        ]
        for row in rows if key == "seconds" else ():
            arm = row["attention"]
            row |= trust(found[arm], again if arm == arms[0] else None)
        tables[f"{key} that {call} takes, by {by}"] = rows
        lines = {a: [(p["length"], float(f"{p[key]:.4g}")) for p in found[a]] for a in found}
        figures[f"{name} of {call}"] = record.curves("seconds of speech", key, lines)
    return tables, figures


def in_turns(
    measure: Callable[[str, float], Point | None], arms: Sequence[str], lengths: Sequence[float]
) -> dict[str, list[Point]]:
    """The points of every arm, up to the length that doesn't fit: all arms at a length in turn."""
    found: dict[str, list[Point]] = {arm: [] for arm in arms}
    fitting = list(arms)
    for length in lengths:
        for arm in list(fitting):
            point = measure(arm, length)
            if point is None:
                print(arm, length, "doesn't fit", flush=True)
                fitting.remove(arm)
            else:
                found[arm].append(point)
                print(arm, json.dumps(point), flush=True)
    return found


def trust(points: Sequence[Point], again: Point | None = None) -> dict[str, Any]:
    """How busy other programs were, and what speaks against times.

    Args:
        points: of an arm.
        again: one of its points measured once more, after all others.
    """
    most, there = max((point["cores"] for point in points), default=0.0), host.usable_cores()
    notes = []
    if most > BUSY_LIMIT * there:
        notes.append(f"the machine was busy, {there} cores in all; measure again when it is idle")
    if again is not None:
        before = next(point for point in points if point["length"] == again["length"])
        moved = again["seconds"] / max(before["seconds"], 1e-12) - 1
        if abs(moved) > DRIFT_LIMIT:
            word = "slower" if moved > 0 else "faster"
            notes.append(f"{abs(moved):.0%} {word} at {again['length']:g} s when all was measured")
    return {"cores busy elsewhere, at most": round(most, 2), "note": "; ".join(notes) or "none"}


def shared(found: Mapping[str, Sequence[Point]], floor: float) -> list[float]:
    """Lengths that fit the memory with every arm, of those so long that length decides."""
    fitting = [{point["length"] for point in points} for points in found.values()]
    return sorted(length for length in set.intersection(*fitting) if length >= floor)


def length_row(
    points: Sequence[Point], key: str, over: Sequence[float], asked: Sequence[float]
) -> dict[str, Any]:
    """The p of key = c length^p by least squares over some lengths, and what every length takes."""
    at = {point["length"]: point[key] for point in points}
    row: dict[str, Any] = {}
    if len(over) > 1:
        p = scaling.exponent(over, [at[length] for length in over])
        row[f"exponent, {over[0]:g} to {over[-1]:g} s"] = round(p, 3)
    for length in asked:
        fits = length in at
        row[f"{length:g} s"] = float(f"{at[length]:.3g}") if fits else "too much memory"
    return row


# Processes --------------------------------------------------------------------------------------


def alone(call: Callable[..., Any], *arguments: Any, gigabytes: int | None = None) -> Any:
    """What a function gives in a process of its own, so that no other one's memory lies about.

    Args:
        call: the function.
        arguments: of it.
        gigabytes: that the process may take; None for all there are.
    """
    with multiprocessing.get_context("spawn").Pool(1, _limit, (gigabytes,)) as pool:
        return pool.apply(call, arguments)


def _limit(gigabytes: int | None) -> None:
    if gigabytes is not None:
        most = gigabytes * 2**30
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
