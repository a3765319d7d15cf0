"""Writes measured claims into `results/<name>.json`; what other scripts measured there stays."""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pared import info, results
from pared.bench.floor import machine

ROOT = Path(__file__).parents[1]


def claim(
    slug: str,
    key: str,
    ours: float,
    spread: float | None,
    seeds: Sequence[int],
    note: str = "",
    machine: str | None = None,
) -> results.Measured:
    """A measured claim: words, value and bound from the method's record, conditions from here."""
    headline = next(h for h in info.get(slug).headlines if h.key == key)
    holds = ours >= headline.bound if headline.direction == "higher" else ours <= headline.bound
    return results.Measured(
        key=key,
        text=headline.text,
        paper=headline.paper,
        ours=round(ours, 4),
        spread=None if spread is None else round(spread, 4),
        direction=headline.direction,
        bound=headline.bound,
        holds=holds,
        command=command(),
        machine=machine or describe_machine(),
        seeds=tuple(seeds),
        commit=commit(),
        date=datetime.date.today().isoformat(),
        note=note,
    )


def write(
    slug: str,
    claims: Sequence[results.Measured],
    tables: Mapping[str, list[dict[str, Any]]] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> Path:
    """Merge claims (by key), tables and figures (by name) into one file.

    Args:
        slug: of a method; or another name, for tables that belong to no method.
        claims: see `claim`.
        tables: rows by the name of their table.
        figures: drawn on the page, by name; each as `curves`, `bars` or `points` makes it.
    """
    path = ROOT / "results" / f"{slug}.json"
    old = results.read(slug, path.parent) or results.Results(slug, ())
    known = info.registry().get(slug)
    order = [h.key for h in known.headlines] if known else []
    # A claim that the record no longer lists goes with its old result.
    kept = {c.key: c for c in (*old.claims, *claims) if c.key in order}
    merged = results.Results(
        slug,
        tuple(sorted(kept.values(), key=lambda c: order.index(c.key))),
        old.tables | dict(tables or {}),
        old.figures | dict(figures or {}),
    )
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(merged), indent=1) + "\n")
    os.replace(partial, path)
    return path


def curves(
    x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]], log: bool = True
) -> dict[str, Any]:
    """Lines over common axes, for `write`.

    Args:
        x: label of the horizontal axis, with the unit.
        y: of the vertical axis.
        series: points (x, y) by the name of their line.
        log: whether both axes are logarithmic.
    """
    return {"x": x, "y": y, "log": log, "series": {n: list(p) for n, p in series.items()}}


def bars(x: str, values: Mapping[str, float]) -> dict[str, Any]:
    """A bar for each of several values, for `write`.

    Args:
        x: what the bars measure, with the unit.
        values: by the name of their bar, from top to bottom; none below 0.
    """
    return {"x": x, "bars": dict(values)}


def points(
    x: str, y: str, groups: Mapping[str, Sequence[tuple[str, float, float]]], log: bool = False
) -> dict[str, Any]:
    """Points of a cost and an error, both the better the lower, for `write`.

    Args:
        x: label of the cost, with the unit.
        y: of the error.
        groups: (label, x, y) by the kind that they belong to; a point may go without a label: "".
        log: whether both axes are logarithmic.
    """
    return {"x": x, "y": y, "log": log, "points": {n: list(p) for n, p in groups.items()}}


def conditions(told: Mapping[str, Any], device: str | torch.device = "cpu") -> list[dict[str, Any]]:
    """A table of how something was measured: what is told of it, and what is always told.

    Args:
        told: values by what they are of.
        device: that it was measured on.
    """
    always = {
        "machine": describe_machine(device),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    rows = {"command": command(), **told, **always}
    return [{"what": what, "value": value} for what, value in rows.items()]


def command() -> str:
    """The command that runs, from the root of the checkout, without what only sums up.

    What is kept was made by the same command, which trains where nothing is kept.
    """
    words = [word for word in sys.argv[1:] if word != "--kept"]
    return " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *words])


def describe_machine(device: str | torch.device = "cpu") -> str:
    """Processor, cores and torch, in words; an accelerator by its name."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    facts = machine()
    cores, threads = facts["cores"], facts["threads"]
    return f"{facts['cpu']}, {cores} cores, {threads} threads, torch {facts['torch']}"


def commit() -> str:
    """The short hash of the code that ran, marked where the tree had changes."""
    hash_ = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "src"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return hash_ + ("+" if dirty else "")
