"""Tries every cache, pared's own and those of other libraries, on every stock pipeline.

    python benchmarks/cache_matrix.py      # minutes on one core

Toy models of the real classes with random weights: what is found is whether a cache works there at
all and in a row of calls (of another size, of another number of steps, and off again), not what it
saves. Writes results/cache-matrix.json. cache-dit is tried where it is installed. With `--keep` it
goes on where it was stopped; pipelines given with `--only` can be tried beforehand.
"""

import argparse
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import record
from diffusers.utils import logging

from pared import info, method
from pared.bench.in_a_row import examined
from pared.bench.peers import CacheDit, Finding
from pared.method import RuntimeMethod

sys.path.insert(0, str(record.ROOT))
from tests.caching.pipelines import BARE, OTHERS, PEERS, SPECS, WAYS, Way

ROWS = (*WAYS, *BARE)
Findings = dict[tuple[str, str], Finding]


def caches() -> dict[str, RuntimeMethod]:
    """Everything that is tried, by the name of its column."""
    records = info.registry().values()
    ours = [SPECS.get(r.slug, r.slug) for r in records if r.kind == "runtime"]
    theirs = {name: peer for name, peer in PEERS.items() if peer.is_installed()}
    return {spec.partition(":")[0]: method.parse(spec) for spec in ours} | theirs


def findings_of(columns: dict[str, RuntimeMethod], ways: list[Way], log: Path | None) -> Findings:
    """What becomes of every cache on every pipeline; what the log has isn't tried again."""
    found = dict(logged(log)) if log is not None and log.exists() else {}
    for way in ways:
        for name, cache in columns.items():
            if (way.name, name) in found:
                continue
            found[way.name, name] = finding = examined(cache, way.made, OTHERS)
            print(f"{way.name}: {name}: {finding.outcome} {finding.detail}", flush=True)
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps([way.name, name, asdict(finding)]) + "\n")
    return found


def logged(log: Path) -> Iterator[tuple[tuple[str, str], Finding]]:
    for line in log.read_text().splitlines():
        way, name, finding = json.loads(line)
        yield (way, name), Finding(**finding | {"failed": tuple(finding["failed"])})


def cell(finding: Finding) -> str:
    """What the table says: what fails, where it works once."""
    return f"fails: {', '.join(finding.failed)}" if finding.failed else finding.outcome


def reasons(findings: Findings) -> list[dict[str, Any]]:
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
    names = [way.name for way in ROWS]
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PIPELINE",
        choices=names,
        help="on these; no result is written",
    )
    parser.add_argument("--keep", type=Path, metavar="FILE", help="findings, to go on from")
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of caches, on what they'd rather run with
    columns, ways = caches(), [w for w in ROWS if not options.only or w.name in options.only]
    findings = findings_of(columns, ways, options.keep)
    if options.only:
        return
    tables = {
        "caches on stock pipelines": [
            {"pipeline": w.name} | {name: cell(findings[w.name, name]) for name in columns}
            for w in ways
        ],
        "where they don't work": reasons(findings),
        "conditions": record.conditions({"versions": versions()}),
    }
    record.write("cache-matrix", (), tables)


if __name__ == "__main__":
    main()
