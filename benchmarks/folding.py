"""One call of a denoiser that was taught four tasks, and of what it folds into, over the base.

    python benchmarks/folding.py      # two minutes on two cores

Stable Diffusion 1.5 at its published size with random weights in bfloat16: time depends on neither.
Writes a table into results/multi-task-upcycling.json.
"""

import argparse
from typing import Any

import record
import torch
from torch import nn

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.bench.timing import Timing, interleave
from pared.experts.folding import fold

SLUG, PRESET, TASK = "multi-task-upcycling", "sd1.5", "edit"


def call(model: nn.Module, side: int) -> Any:
    """One call of a denoiser on latents of a square."""
    family = anatomy.of(model)
    latents, timestep, condition = family.example(height=side, width=side)
    latents = latents[:, : model.config.in_channels]

    def run() -> None:
        with torch.no_grad():
            family.denoise(model, latents, timestep, condition)

    return run


def row(name: str, model: nn.Module, timing: Timing) -> dict[str, float | str]:
    """One model's call, against the base's of the same round."""
    return {
        "model": name,
        "parameters (M)": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "seconds": float(f"{timing.median:.3g}"),
        "time over base": round(1 / timing.ratio, 3),
        "least": round(1 / timing.ratio_high, 3),
        "greatest": round(1 / timing.ratio_low, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    base = presets.build(PRESET, dtype=torch.bfloat16).eval()
    upcycled = pared.convert(presets.build(PRESET, dtype=torch.bfloat16), pared.parse(SLUG)).eval()
    models = {
        "base": base,
        "base again": base,
        "all tasks": upcycled,
        f"folded for {TASK}": fold(upcycled, TASK),
    }
    calls = {name: call(model, options.pixels // 8) for name, model in models.items()}
    timings = interleave(calls, options.rounds, warmup=1)
    rows = [row(name, model, timings[name]) for name, model in models.items()]
    for each in rows:
        print(each, flush=True)
    print(*timings.verdict.notes)
    where = f"{PRESET} at {options.pixels} pixels, {record.describe_machine()}"
    record.write(SLUG, (), {f"one call, {where}": rows})


if __name__ == "__main__":
    main()
