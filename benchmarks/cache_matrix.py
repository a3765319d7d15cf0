"""Tries every cache, pared's own and those of other libraries, on every stock pipeline.

    python benchmarks/cache_matrix.py      # minutes on one core

Toy models of the real classes with random weights: what is found is whether a cache works there at
all, not what it saves. Writes results/cache-matrix.json. cache-dit is tried where it is installed.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import record
from diffusers.utils import logging
from torch import Tensor

from pared import info, method
from pared.bench.peers import CacheDit, Finding, matrix
from pared.method import RuntimeMethod

sys.path.insert(0, str(record.ROOT))
from tests.caching.pipelines import PEERS, SPECS, WAYS, Way


def caches() -> dict[str, RuntimeMethod]:
    """Everything that is tried, by the name of its column."""
    records = info.registry().values()
    ours = [SPECS.get(r.slug, r.slug) for r in records if r.kind == "runtime"]
    theirs = {
        name: peer
        for name, peer in PEERS.items()
        if not isinstance(peer, CacheDit) or peer.is_installed()
    }
    return {spec.partition(":")[0]: method.parse(spec) for spec in ours} | theirs


def made(way: Way) -> tuple[Any, Callable[[], Tensor]]:
    """A fresh pipeline, and the call to be made of it."""
    pipe = way.build()
    return pipe, lambda: way.paint(pipe)


def reasons(findings: dict[tuple[str, str], Finding]) -> list[dict[str, Any]]:
    """What was said where a cache didn't work, each once, with all pipelines."""
    said: dict[tuple[str, Finding], list[str]] = {}
    for (way, cache), finding in findings.items():
        if finding.outcome != "works":
            said.setdefault((cache, finding), []).append(way)
    return [
        {
            "cache": cache,
            "pipelines": "; ".join(ways),
            "outcome": finding.outcome,
            "what it says": finding.detail,
        }
        for (cache, finding), ways in said.items()
    ]


def versions() -> str:
    names = ["torch", "diffusers", *(["cache-dit"] if CacheDit.is_installed() else [])]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [way.name for way in WAYS]
    parser.add_argument(
        "--only", nargs="+", metavar="PIPELINE", choices=names, help="on these; nothing is kept"
    )
    options = parser.parse_args()
    logging.set_verbosity_error()
    columns, ways = caches(), [w for w in WAYS if not options.only or w.name in options.only]
    findings = matrix(columns, {way.name: partial(made, way) for way in ways})
    for (way, cache), finding in findings.items():
        print(f"{way}: {cache}: {finding.outcome} {finding.detail}")
    if options.only:
        return
    tables = {
        "caches on stock pipelines": [
            {"pipeline": w.name} | {name: findings[w.name, name].outcome for name in columns}
            for w in ways
        ],
        "where they don't work": reasons(findings),
        "conditions": [
            {"what": "versions", "value": versions()},
            {"what": "command", "value": record.command()},
            {"what": "machine", "value": record.describe_machine()},
            {"what": "commit", "value": record.commit()},
        ],
    }
    record.write("cache-matrix", (), tables)


if __name__ == "__main__":
    main()
