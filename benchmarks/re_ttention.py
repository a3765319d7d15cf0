"""Measures Re-ttention against a plain window and against its parts, on the house PixArt.

    python benchmarks/re_ttention.py              # a few minutes on two cores

Writes the claims and the table into results/re-ttention.json.
"""

import argparse
from statistics import mean, stdev

import record
import torch
from painting import OF_PIXART

import pared
from pared.attention import re_ttention
from pared.attention.re_ttention import Kept, statistics
from pared.checkpoint import load
from pared.worlds import emoji
from pared.worlds.house import folder_of

KEEP = 0.03125  # of 256 keys
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "latent"}


def _zero(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


# What stands for the keys that a sparse step leaves out.
VARIANTS = {
    "nothing": lambda full, part: Kept(torch.ones_like(full.lse), _zero(full.output)),
    "rho alone": lambda full, part: Kept(statistics(full, part).rho, _zero(full.output)),
    "R alone": lambda full, part: Kept(torch.ones_like(full.lse), full.output - part.output),
    "rho and R": statistics,
}


def distances(pipeline, prompts: list[str], seed: int) -> dict[str, float]:
    """RMS distance of latents to the full model's, on the same noise, by variant."""
    shape = (len(prompts), 4, 16, 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def latents() -> torch.Tensor:
        return pipeline(prompts, latents=noise.clone(), **SETTINGS, **OF_PIXART).images

    base, found = latents(), {}
    for name, variant in VARIANTS.items():
        re_ttention.statistics = variant
        method = pared.Rettention(keep=KEEP, ramp=0.04 if variant is statistics else 0.0)
        with pared.apply(pipeline, method):
            found[name] = float((latents() - base).square().mean().sqrt())
        re_ttention.statistics = statistics
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    pipeline = load(folder_of("house:pixart"))
    pipeline.set_progress_bar_config(disable=True)
    captions = emoji.load(split="train", size=None).captions
    prompts = captions[:: len(captions) // options.prompts][: options.prompts]
    runs = [distances(pipeline, prompts, seed) for seed in range(options.seeds)]
    rows = []
    for name in VARIANTS:
        values = [run[name] for run in runs]
        row = {"what stands for the keys left out": name, "distance": mean(values)}
        rows.append(row | {"distance sd": stdev(values)} if len(values) > 1 else row)
    for row in rows:
        print(row)
    ratios = [run["R alone"] / run["rho and R"] for run in runs]
    spread = stdev(ratios) if len(ratios) > 1 else None
    note = (
        f"house:pixart, 20 steps, {len(prompts)} prompts, RMS distance of latents; "
        "R alone over rho and R, mean of ratios by seed"
    )
    seeds = range(options.seeds)
    key = "distance-window-over-rettention"
    band = pared.Rettention().half_width(4096)
    sparsity = 1 - sum(min(i + band, 4095) - max(i - band, 0) + 1 for i in range(4096)) / 4096**2
    claims = [
        record.claim("re-ttention", "sparsity-1024", sparsity, None, (0,), "counted"),
        record.claim("re-ttention", key, mean(ratios), spread, seeds, note),
    ]
    record.write("re-ttention", claims, {"distance to the full model": rows})


if __name__ == "__main__":
    main()
