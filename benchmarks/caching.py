"""Measures every way of reusing work between steps against fewer steps, on the house models.

    python benchmarks/caching.py                    # three families, three seeds
    python benchmarks/caching.py --family unet      # one of them

The distance is that of the pictures to those of the whole model from the same noise; fewer steps,
the rival, are as many as cost the same multiply-adds. Writes the table into results/caching.json
and each method's claims into its own file. What is done is kept under runs/caching.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import record
import torch
from painting import OF_PIXART

import pared
from pared.bench import grid, metering
from pared.checkpoint import load
from pared.method import denoiser
from pared.worlds import emoji
from pared.worlds.house import folder_of

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
STEPS = {"pixart": (20, 50), "sd3": (30,), "unet": (50,)}
GUIDANCE = 4.0
# A seed paints as many pictures, each of a prompt of its own.
PICTURES = 16

Figures = dict[str, Any]


@dataclass(frozen=True)
class Rivals:
    """A claim: a rival's distance to the whole model's pictures over a method's.

    Attributes:
        slug: of the method.
        key: of the claim.
        family: that decides it.
        steps: of the whole model.
        ours: spec of the method.
        rival: spec of the rival; "" is the model with the steps that cost as much.
    """

    slug: str
    key: str
    family: str
    steps: int
    ours: str
    rival: str = ""


CLAIMS = (
    Rivals("deepcache", "distance-10-over-2", "unet", 50, "deepcache:interval=2",
           "deepcache:interval=10"),
    Rivals("deepcache", "distance-fewer-steps-over-deepcache", "unet", 50, "deepcache"),
    Rivals("delta-dit", "distance-fewer-steps-over-delta", "pixart", 20, "delta-dit"),
    Rivals("taylorseer", "distance-reuse-over-forecast", "pixart", 50, "taylorseer",
           "taylorseer:order=0"),
    Rivals("taylorseer", "distance-fewer-steps-over-forecast", "pixart", 50, "taylorseer"),
    Rivals("ras", "distance-without-resets-over-ras", "sd3", 30, "ras", "ras:resets=[]"),
    Rivals("ras", "distance-fewer-steps-over-ras", "sd3", 30, "ras"),
)  # fmt: skip
# A cache of the output against one of its change, for a third of the blocks at every place.
THIRDS = [
    (f"delta-dit:cached={{third}},rule={rule}", f"delta-dit:cached={{third}},rule={rule},"
     "reuse=feature_map")
    for rule in ("front", "middle", "rear")
]  # fmt: skip


class Bench:
    """One house model at one number of steps."""

    def __init__(self, family: str, steps: int, pictures: int) -> None:
        self.family, self.steps = family, steps
        self.pipeline = load(folder_of(f"house:{family}"), device=DEVICE)
        self.pipeline.set_progress_bar_config(disable=True)
        captions = emoji.load(split="train", size=None).captions
        self.prompts = captions[:: len(captions) // pictures][:pictures]
        self.folder = Path("runs/caching") / f"{family}-{steps}x{pictures}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.plain: dict[tuple[int, int], tuple[torch.Tensor, float]] = {}
        self.cost = self.macs("")

    @torch.no_grad()
    def painted(
        self, spec: str, seed: int, steps: int | None = None, count: int | None = None
    ) -> tuple[torch.Tensor, float]:
        """Pictures (count, 3, 64, 64) in [0, 1], and the seconds that they took."""
        prompts = self.prompts[:count]
        extra = OF_PIXART if self.family == "pixart" else {}
        noise = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
        methods = grid.methods_of((spec,)) if spec else ()
        with pared.apply(self.pipeline, *methods):
            start = time.perf_counter()
            images = self.pipeline(
                prompts,
                num_inference_steps=steps or self.steps,
                guidance_scale=GUIDANCE,
                generator=noise,
                height=64,
                width=64,
                output_type="pt",
                **extra,
            ).images
            return images.float().cpu(), time.perf_counter() - start

    def alone(self, seed: int, steps: int) -> tuple[torch.Tensor, float]:
        """The same from the model alone; painted once."""
        if (seed, steps) not in self.plain:
            self.plain[seed, steps] = self.painted("", seed, steps)
        return self.plain[seed, steps]

    def macs(self, spec: str) -> int:
        """Multiply-adds of the denoiser in a run."""
        run = lambda: self.painted(spec, 0, count=1)  # noqa: E731
        count = metering.count(run, denoiser(self.pipeline))
        return count.total - count.macs.get(metering.OUTSIDE, 0)

    def fewer(self, cost: int) -> int:
        """Steps of the model alone that cost about as much."""
        return max(1, round(self.steps * cost / self.cost))

    def figures(self, spec: str, seed: int) -> Figures:
        """Distances of a method and of fewer steps at its cost, and times; kept once done."""
        path = self.folder / f"{re.sub('[^a-z0-9.]+', '-', spec)}-{seed}.json"
        if path.exists():
            return json.loads(path.read_text())
        cost = self.macs(spec)
        steps = self.fewer(cost)
        wanted, seconds = self.alone(seed, self.steps)
        ours, ours_seconds = self.painted(spec, seed)
        rival, rival_seconds = self.alone(seed, steps)
        found = {
            "cost": cost / self.cost,
            "time": ours_seconds / seconds,
            "distance": distance(ours, wanted),
            "PSNR": psnr(ours, wanted),
            "steps": steps,
            "time of steps": rival_seconds / seconds,
            "distance of steps": distance(rival, wanted),
            "PSNR of steps": psnr(rival, wanted),
        }
        path.write_text(json.dumps(found))
        return found


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Root of the mean squared difference."""
    return float((x - y).square().mean().sqrt())


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over the pictures, in dB."""
    return float(-10 * (x - y).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10().mean())


def specs_of(bench: Bench) -> Iterator[str]:
    """The grid of the family's methods, and what claims need beside it."""
    found = grid.settings(bench.family)
    for claim in CLAIMS:
        if (claim.family, claim.steps) == (bench.family, bench.steps):
            found += [claim.ours, claim.rival]
    if (bench.family, bench.steps) == ("pixart", 20):
        found += [spec for pair in thirds(bench) for spec in pair]
    specs = [spec for spec in dict.fromkeys(found) if spec]
    yield from (stack[0] for stack in grid.attachable(bench.pipeline, specs))


def thirds(bench: Bench) -> list[tuple[str, str]]:
    """The Delta and the feature map of a third of the blocks, at every place."""
    blocks = len(pared.anatomy.of(denoiser(bench.pipeline)).blocks)
    return [(a.format(third=blocks // 3), b.format(third=blocks // 3)) for a, b in THIRDS]


def row_of(spec: str, runs: list[Figures]) -> Figures:
    """A row of the table: means over the seeds."""
    times = [run["time"] for run in runs]
    return {
        "way": spec,
        "seeds": len(runs),
        "share of multiply-adds": round(runs[0]["cost"], 3),
        "share of time": round(median(times), 3),
        "PSNR": round(mean(run["PSNR"] for run in runs), 2),
        "distance": round(mean(run["distance"] for run in runs), 4),
        "steps at its cost": runs[0]["steps"],
        "PSNR of these": round(mean(run["PSNR of steps"] for run in runs), 2),
        "distance of these": round(mean(run["distance of steps"] for run in runs), 4),
    }


def decide(bench: Bench, done: dict[str, list[Figures]]) -> None:
    """Write the claims that this model decides."""
    about = f"house:{bench.family}, {bench.steps} steps, {len(bench.prompts)} pictures a seed"
    for claim in CLAIMS:
        if (claim.family, claim.steps) != (bench.family, bench.steps):
            continue
        ours = done[claim.ours]
        if claim.rival:
            found = [
                a["distance"] / b["distance"] for a, b in zip(done[claim.rival], ours, strict=True)
            ]
            note = f"{about}, RMS distance of pictures, {claim.rival} over {claim.ours}"
        else:
            found = [run["distance of steps"] / run["distance"] for run in ours]
            note = f"{about}, RMS distance of pictures, {ours[0]['steps']} steps over {claim.ours}"
        write_claim(claim.slug, claim.key, found, note)
    if (bench.family, bench.steps) == ("pixart", 20):
        each = [
            [b["distance"] / a["distance"] for a, b in zip(done[delta], done[output], strict=True)]
            for delta, output in thirds(bench)
        ]
        found = [min(ratios) for ratios in zip(*each, strict=True)]
        note = (
            f"{about}, RMS distance of pictures, a third of the blocks, the least of three places"
        )
        write_claim("delta-dit", "distance-feature-map-over-delta", found, note)


def write_claim(slug: str, key: str, found: list[float], note: str) -> None:
    """One claim from its values by seed."""
    spread = stdev(found) if len(found) > 1 else None
    machine = record.describe_machine(DEVICE)
    claim = record.claim(slug, key, mean(found), spread, range(len(found)), note, machine)
    record.write(slug, [claim])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of a seed")
    options = parser.parse_args()
    for family in options.family:
        for steps in STEPS[family]:
            bench = Bench(family, steps, options.pictures)
            done: dict[str, list[Figures]] = {}
            for seed in range(options.seeds):
                for spec in specs_of(bench):
                    done.setdefault(spec, []).append(bench.figures(spec, seed))
                    print(family, steps, spec, seed, done[spec][-1], flush=True)
            rows = [row_of(spec, runs) for spec, runs in done.items()]
            table = f"{family}, {steps} steps, {options.pictures} pictures a seed"
            record.write("caching", (), {table: rows})
            decide(bench, done)


if __name__ == "__main__":
    main()
