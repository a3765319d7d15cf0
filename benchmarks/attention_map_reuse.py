"""Measures HURRY and PHAST against fewer steps, and which steps bear reuse, on the house U-Net.

    python benchmarks/attention_map_reuse.py                # on two cores: twenty minutes
    python benchmarks/attention_map_reuse.py --minutes 40   # the search goes on where it stopped

PHAST starts from HURRY and swaps, as long as there's time; then both are measured on other prompts
and noise than it searched on, against as many steps as the paper's first figure pairs with it.
Writes claims, table and curves into results/attention-map-reuse.json. What was scored is kept under
runs/attention-map-reuse.
"""

import argparse
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import record
import torch

import pared
from pared.bench.subjects import PROMPTS
from pared.bench.timing import interleave
from pared.caching.runs import Runs, sensitivity
from pared.caching.schedules import Bits, Log, ReuseSchedule, alternate, hurry, search
from pared.checkpoint import load
from pared.worlds import emoji
from pared.worlds.house import folder_of

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
SLUG, MODEL = "attention-map-reuse", "house:unet"
FOLDER = Path("runs") / SLUG
# N, k, and the steps that cost as much.
STEPS, COUNT, FEWER = 20, 10, 13
CALL: dict[str, Any] = {"guidance_scale": 4.0, "height": 64, "width": 64}
# Noise of the search; that of the seeds it's measured on begins at 0.
SEARCHED = 1000


class Limited:
    """A score that ends the search, with the best until then, when its time is over."""

    def __init__(self, runs: Runs, minutes: float) -> None:
        self.runs, self.end = runs, time.monotonic() + 60 * minutes

    def __call__(self, bits: Bits) -> float:
        if bits != hurry(STEPS, COUNT) and time.monotonic() > self.end:
            raise KeyboardInterrupt
        return self.runs(bits)


def captions(count: int, first: int) -> list[str]:
    """As many from all over the emoji world; those of another `first` are others."""
    known = [c for c in emoji.load(split="train", size=None).captions if c not in PROMPTS]
    return known[first :: len(known) // count][:count]


def searched(pipeline: Any, options: argparse.Namespace) -> tuple[ReuseSchedule, Runs]:
    """PHAST's schedule, and the runs that it was searched on."""
    prompts = captions(options.prompts, 0)
    runs = Runs(
        pipeline,
        pared.AttentionMapReuse(),
        STEPS,
        [SEARCHED],
        latents=True,
        batch_size=options.prompts,
        prompt=prompts,
        **CALL,
    )
    about = {"model": MODEL, "steps": STEPS, "prompts": prompts, "seed": SEARCHED, "call": CALL}
    log = Log(FOLDER / f"scores-{STEPS}x{options.prompts}.jsonl", about)
    sampler = type(pipeline.scheduler).__name__
    score = Limited(runs, options.minutes)
    return search(score, STEPS, COUNT, "swaps", log, MODEL, sampler), runs


def compared(pipeline: Any, phast: Bits, seed: int, count: int) -> dict[str, float]:
    """PSNR in dB to the pictures of all steps, on prompts that weren't searched on."""
    runs = Runs(
        pipeline,
        pared.AttentionMapReuse(),
        STEPS,
        [seed],
        batch_size=count,
        prompt=captions(count, 1),
        **CALL,
    )
    return {
        "PHAST": runs(phast),
        "HURRY": runs(hurry(STEPS, COUNT)),
        "every second step": runs(alternate(STEPS, COUNT)),
        f"{FEWER} steps": runs.fewer(FEWER),
    }


def timed(pipeline: Any, phast: Bits, rounds: int, count: int) -> Any:
    """Runs with the schedule's reuse, in turn with runs of fewer steps and of all."""
    method = pared.AttentionMapReuse().under(phast)

    def run(steps: int) -> None:
        noise = [torch.Generator().manual_seed(i) for i in range(count)]
        pipeline(
            captions(count, 1),
            num_inference_steps=steps,
            generator=noise,
            output_type="latent",
            **CALL,
        )

    calls = {"fewer": partial(run, FEWER), "reuse": partial(run, STEPS), "all": partial(run, STEPS)}
    around = {"reuse": lambda: pared.apply(pipeline, method)}
    return interleave(calls, rounds, warmup=1, base="fewer", around=around)


def step_curves(runs: Runs) -> dict[str, Any]:
    """What reuse at one step alone does to the end, and what any error there does."""

    def points(values: Iterable[float]) -> list[tuple[float, float]]:
        return [(step, float(f"{value:.4g}")) for step, value in enumerate(values, 1)]

    closeness = {"reuse at this step alone": points(sensitivity(runs, STEPS))}
    growth = {"any small error": points(runs.amplification())}
    return {
        "closeness of the end by the step that reuses": record.curves(
            "step", "PSNR (dB)", closeness, log=False
        ),
        "growth of a step's error until the end": record.curves(
            "step", "change of the end over change of the step", growth, log=False
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=14, help="of searching")
    parser.add_argument("--prompts", type=int, default=4, help="that the search paints")
    parser.add_argument("--pictures", type=int, default=16, help="of a seed, to measure on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    options = parser.parse_args()
    pipeline = load(folder_of(MODEL), device=DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    found, runs = searched(pipeline, options)
    print("PHAST", found.to_dict(), flush=True)
    figures = step_curves(runs)
    done = [compared(pipeline, found.bits, s, options.pictures) for s in range(options.seeds)]
    times = timed(pipeline, found.bits, options.rounds, options.pictures)
    rows = [
        {"run": name, "PSNR (dB)": round(mean(run[name] for run in done), 2)} for name in done[0]
    ]
    for row in rows:
        print(row)
    print({name: timing.median for name, timing in times.items()}, times.verdict.notes, flush=True)

    machine, seeds = record.describe_machine(DEVICE), range(options.seeds)
    ended = "" if found.complete else ", stopped before its end"
    about = (
        f"{MODEL}, {found.sampler}, guided; PHAST searched on {options.prompts} other prompts"
        f"{ended}; {options.pictures} pictures a seed"
    )

    def gain(key: str, rival: str) -> Any:
        gains = [run["PHAST"] - run[rival] for run in done]
        spread = stdev(gains) if len(gains) > 1 else None
        return record.claim(SLUG, key, mean(gains), spread, seeds, about, machine)

    ours = times["reuse"]
    spread = (1 / ours.ratio_low - 1 / ours.ratio_high) / 2
    note = f"{MODEL}, {options.pictures} guided pictures, {options.rounds} interleaved rounds"
    claims = [
        gain("decibels-over-fewer-steps", f"{FEWER} steps"),
        gain("decibels-phast-over-hurry", "HURRY"),
        record.claim(SLUG, "time-over-13-steps", 1 / ours.ratio, spread, (0,), note, machine),
    ]
    accepted = [
        {"accepted": number, "PSNR (dB)": round(value, 2)}
        for number, value in enumerate(found.curve)
    ]
    bits = "".join(map(str, found.bits))
    tables = {
        f"{COUNT} of {STEPS} steps reuse": rows,
        f"PHAST's search, which found {bits}": accepted,
    }
    record.write(SLUG, claims, tables, figures)


if __name__ == "__main__":
    main()
