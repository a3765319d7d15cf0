"""Measures how forecasts bear guidance and a sampler that looks back, on house:pixart.

    python benchmarks/taylorseer_guidance.py            # on one core: half an hour

A sampler of second order extrapolates from the model's last outputs. Where these are extrapolated
themselves, and their errors multiplied by guidance, a run can swing out. Forecasts and plain reuse
of every second step are painted with samplers of both orders at three scales, and compared with the
whole model's pictures there. The paper's claims are measured as it samples DiT-XL/2: 50 steps of
DDIM, which is the sampler of first order, at a scale of 1.5; and, beside them, as the house model
paints. Writes tables and claims into results/taylorseer.json; what is painted is kept under
runs/caching.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import product
from statistics import mean, stdev
from typing import Any

import record
from diffusers import DPMSolverMultistepScheduler

from caching import GUIDANCE, PICTURES, SEEDS, Bench, Done, Rivals, psnr, row_of

SLUG = "taylorseer"
STEPS = 20
SCALES, ORDERS = (1.0, 2.0, 4.0), (1, 2)
WAYS = {
    "forecast": "taylorseer:interval=2",
    "forecast, order 2": "taylorseer:interval=2,order=2",
    "reuse": "taylorseer:interval=2,order=0",
}
# Of the claims. The first pair of order and scale decides them.
CLAIMED_STEPS = 50
SAMPLERS = ((1, 1.5), (2, GUIDANCE))
FORECAST, REUSE = "taylorseer", "taylorseer:order=0"
CLAIMS = (
    Rivals(SLUG, "distance-reuse-over-forecast", "pixart", FORECAST, REUSE),
    Rivals(SLUG, "distance-fewer-steps-over-forecast", "pixart", FORECAST),
)


def guided(steps: int, order: int, scale: float, pictures: int) -> Bench:
    """The house model under a guidance scale, with a sampler of this order."""
    bench = Bench("pixart", steps, pictures)
    bench.guidance = scale
    bench.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        bench.pipeline.scheduler.config, solver_order=order
    )
    bench.folder = bench.folder / f"order-{order}-guidance-{scale:g}"
    bench.folder.mkdir(exist_ok=True)
    return bench


def fidelities(bench: Bench, seed: int) -> dict[str, float]:
    """PSNR of each way to the whole model, in dB; kept once done."""
    path = bench.folder / f"fidelities-{seed}.json"
    if not path.exists():
        wanted, _ = bench.alone(seed, STEPS)
        found = {way: psnr(bench.painted(spec, seed)[0], wanted) for way, spec in WAYS.items()}
        path.write_text(json.dumps(found))
    return dict(json.loads(path.read_text()))


def rows(seeds: list[int], pictures: int) -> Iterator[dict[str, Any]]:
    """A row for every order and scale: means over the seeds, and their spread."""
    for order, scale in product(ORDERS, SCALES):
        bench = guided(STEPS, order, scale, pictures)
        runs = [fidelities(bench, seed) for seed in seeds]
        row: dict[str, Any] = {"order of the sampler": order, "guidance": scale}
        for way in WAYS:
            values = [run[way] for run in runs]
            row[f"{way}, dB"] = round(mean(values), 2)
            if len(values) > 1:
                row[f"sd of {way}"] = round(stdev(values), 2)
        print(row, flush=True)
        yield row


def claimed(seeds: list[int], pictures: int) -> Iterator[dict[str, Any]]:
    """A row for forecast and reuse under either sampler; the first decides the claims."""
    for order, scale in SAMPLERS:
        bench = guided(CLAIMED_STEPS, order, scale, pictures)
        done: Done = {
            spec: {seed: bench.figures(spec, seed) for seed in seeds} for spec in (FORECAST, REUSE)
        }
        for spec, runs in done.items():
            row = {"order of the sampler": order, "guidance": scale}
            row |= row_of(spec, list(runs.values()))
            print(row, flush=True)
            yield row
        if (order, scale) == SAMPLERS[0]:
            about = f"house:pixart, {CLAIMED_STEPS} steps of DDIM, guidance {scale:g}, "
            about += f"{pictures} pictures a seed"
            for claim in CLAIMS:
                claim.write(done, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of a seed")
    options = parser.parse_args()
    asked = (options.seeds, options.pictures)
    every_second = f"house:pixart, {STEPS} steps of DPM-Solver++, every second one skipped, "
    every_second += f"PSNR to the whole model, {options.pictures} pictures a seed"
    every_fourth = f"house:pixart, {CLAIMED_STEPS} steps, every fourth computed, "
    every_fourth += f"{options.pictures} pictures a seed"
    tables = {every_second: list(rows(*asked)), every_fourth: list(claimed(*asked))}
    record.write(SLUG, (), tables)


if __name__ == "__main__":
    main()
