"""Measures how forecasts bear guidance and a sampler that looks back, on house:pixart.

    python benchmarks/taylorseer_guidance.py            # on one core: ten minutes

A sampler of second order extrapolates from the model's last outputs. Where these are extrapolated
themselves, and their errors multiplied by guidance, a run can swing out. Forecasts and plain reuse
of every second step are painted with samplers of both orders at three scales, and compared with the
whole model's pictures there. Writes a table into results/taylorseer.json; what is painted is kept
under runs/caching.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import product
from statistics import mean, stdev
from typing import Any

import record
from diffusers import DPMSolverMultistepScheduler

from caching import PICTURES, SEEDS, Bench, psnr

STEPS = 20
SCALES, ORDERS = (1.0, 2.0, 4.0), (1, 2)
WAYS = {
    "forecast": "taylorseer:interval=2",
    "forecast, order 2": "taylorseer:interval=2,order=2",
    "reuse": "taylorseer:interval=2,order=0",
}


def guided(order: int, scale: float, pictures: int) -> Bench:
    """The house model under a guidance scale, with a sampler of this order."""
    bench = Bench("pixart", STEPS, pictures)
    bench.guidance = scale
    bench.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        bench.pipeline.scheduler.config, solver_order=order
    )
    return bench


def fidelities(bench: Bench, seed: int) -> dict[str, float]:
    """PSNR of each way to the whole model, in dB; kept once done."""
    order = bench.pipeline.scheduler.config.solver_order
    path = bench.folder / f"guidance-{bench.guidance:g}-order-{order}-{seed}.json"
    if not path.exists():
        wanted, _ = bench.alone(seed, STEPS)
        found = {way: psnr(bench.painted(spec, seed)[0], wanted) for way, spec in WAYS.items()}
        path.write_text(json.dumps(found))
    return dict(json.loads(path.read_text()))


def rows(seeds: list[int], pictures: int) -> Iterator[dict[str, Any]]:
    """A row for every order and scale: means over the seeds, and their spread."""
    for order, scale in product(ORDERS, SCALES):
        bench = guided(order, scale, pictures)
        runs = [fidelities(bench, seed) for seed in seeds]
        row: dict[str, Any] = {"order of the sampler": order, "guidance": scale}
        for way in WAYS:
            values = [run[way] for run in runs]
            row[f"{way}, dB"] = round(mean(values), 2)
            if len(values) > 1:
                row[f"sd of {way}"] = round(stdev(values), 2)
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of a seed")
    options = parser.parse_args()
    name = f"house:pixart, {STEPS} steps of DPM-Solver++, every second one skipped, "
    name += f"PSNR to the whole model, {options.pictures} pictures a seed"
    record.write("taylorseer", (), {name: list(rows(options.seeds, options.pictures))})


if __name__ == "__main__":
    main()
