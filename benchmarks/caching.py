"""Measures every way of reusing work between steps against fewer steps, on the house models.

    python benchmarks/caching.py                                  # three families, three seeds
    python benchmarks/caching.py --family unet --seeds 0          # a piece, for several processes
    python benchmarks/caching.py --kept                           # sum up the pieces that are done

The ways are the settings in the methods' records, plain reuse, and with --peers the caches of
diffusers and cache-dit that work there. The distance is that of the pictures to those of the whole
model from the same noise; fewer steps, the rival, are as many as cost the same multiply-adds. What
is done is kept under runs/caching, and nothing is measured twice. A run of all seeds, or --kept,
writes tables and figures into results/caching.json and each method's claims into its own file.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import record
import torch
from painting import OF_PIXART

import pared
from pared import info
from pared.bench import fidelity, grid, metering, peers
from pared.bench.graphs import pareto
from pared.bench.quality import PSNR_CAP
from pared.checkpoint import load
from pared.method import RuntimeMethod, denoiser
from pared.worlds import emoji
from pared.worlds.house import folder_of

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
STEPS = {"pixart": 20, "sd3": 30, "unet": 50}
GUIDANCE = 4.0
# A seed paints as many pictures, each of a prompt of its own.
SEEDS = (0, 1, 2)
PICTURES = 8

Figures = dict[str, Any]
# What was measured, by way and seed.
Done = dict[str, dict[int, Figures]]


@dataclass(frozen=True)
class Rivals:
    """A claim: a rival's distance to the whole model's pictures over a method's.

    Attributes:
        slug: of the method.
        key: of the claim.
        family: that decides it.
        ours: spec of the method.
        rival: spec of the rival; "" is the model with the steps that cost as much.
    """

    slug: str
    key: str
    family: str
    ours: str
    rival: str = ""

    def write(self, done: Done, about: str) -> None:
        """Write the claim, if its ways are done."""
        ours, rival = done.get(self.ours, {}), done.get(self.rival, {})
        if self.rival:
            found = {s: rival[s]["distance"] / ours[s]["distance"] for s in ours if s in rival}
            note = f"{about}, RMS distance of pictures, {self.rival} over {self.ours}"
        else:
            found = {s: run["distance of steps"] / run["distance"] for s, run in ours.items()}
            steps = next((run["steps"] for run in ours.values()), 0)
            note = f"{about}, RMS distance of pictures, {steps} steps over {self.ours}"
        write_claim(self.slug, self.key, found, note, machines(ours))


CLAIMS = (
    Rivals("deepcache", "distance-10-over-2", "unet", "deepcache:interval=2",
           "deepcache:interval=10"),
    Rivals("deepcache", "distance-fewer-steps-over-deepcache", "unet", "deepcache"),
    Rivals("delta-dit", "distance-fewer-steps-over-delta", "pixart", "delta-dit"),
    Rivals("ras", "distance-without-resets-over-ras", "sd3", "ras", "ras:resets=[]"),
    Rivals("ras", "distance-fewer-steps-over-ras", "sd3", "ras"),
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
        self.guidance = GUIDANCE
        self.pipeline = load(folder_of(f"house:{family}"), device=DEVICE)
        self.pipeline.set_progress_bar_config(disable=True)
        captions = emoji.load(split="train", size=None).captions
        self.prompts = captions[:: len(captions) // pictures][:pictures]
        self.folder = Path("runs/caching") / f"{family}-{steps}x{pictures}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.plain: dict[tuple[int, int], tuple[torch.Tensor, float]] = {}
        self.peers = {peer.spec(): peer for peer in grid.peers_for(steps)}

    @cached_property
    def cost(self) -> int:
        """Multiply-adds of the denoiser in a run of the whole model."""
        return self.macs("")

    def methods(self, spec: str) -> tuple[RuntimeMethod, ...]:
        """What a way attaches: a method, a cache of another library, or nothing."""
        if spec in self.peers:
            return (self.peers[spec],)
        return grid.methods_of((spec,)) if spec else ()

    @torch.no_grad()
    def painted(
        self, spec: str, seed: int, steps: int | None = None, count: int | None = None
    ) -> tuple[torch.Tensor, float]:
        """Pictures (count, 3, 64, 64) in [0, 1], and the seconds that they took."""
        prompts = self.prompts[:count]
        extra = OF_PIXART if self.family == "pixart" else {}
        noise = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
        with pared.apply(self.pipeline, *self.methods(spec)):
            start = time.perf_counter()
            images = self.pipeline(
                prompts,
                num_inference_steps=steps or self.steps,
                guidance_scale=self.guidance,
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
        run = partial(self.painted, spec, 0, count=1)
        count = metering.count(run, denoiser(self.pipeline))
        return count.total - count.macs.get(metering.OUTSIDE, 0)

    def fewer(self, cost: int) -> int:
        """Steps of the model alone that cost about as much."""
        return max(1, round(self.steps * cost / self.cost))

    def path(self, spec: str, seed: int) -> Path:
        """Where the figures of a way are kept."""
        return self.folder / f"{re.sub('[^a-z0-9.]+', '-', spec)}-{seed}.json"

    def figures(self, spec: str, seed: int) -> Figures:
        """Distances of a method and of fewer steps at its cost, and times; kept once done."""
        path = self.path(spec, seed)
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
            "machine": record.describe_machine(DEVICE),
        }
        path.write_text(json.dumps(found))
        return found

    def working_peers(self) -> list[str]:
        """Caches of other libraries that work here, tried on one picture; kept once known."""
        path = self.folder / "peers.json"
        known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        for spec, peer in self.peers.items():
            if spec not in known and peer.is_installed():
                found = peers.tried(peer, self.pipeline, lambda: self.painted("", 0, count=1)[0])
                known[spec] = f"{found.outcome} {found.detail}".strip()
        path.write_text(json.dumps(known, indent=1))
        return [spec for spec in self.peers if known.get(spec) == "works"]


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Root of the mean squared difference."""
    return float((x - y).square().mean().sqrt())


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over the pictures, in dB."""
    return float(fidelity.psnr(x, y).clamp(max=PSNR_CAP).mean())


def specs_of(bench: Bench) -> Iterator[str]:
    """The grid of the family's methods, and what claims need beside it."""
    found = grid.settings(bench.family)
    for claim in CLAIMS:
        if claim.family == bench.family:
            found += [claim.ours, claim.rival]
    if bench.family == "pixart":
        found += [spec for pair in thirds(bench) for spec in pair]
    specs = [spec for spec in dict.fromkeys(found) if spec]
    yield from (stack[0] for stack in grid.attachable(bench.pipeline, specs))


def measured(bench: Bench, seeds: list[int], with_peers: bool) -> Done:
    """Every way with every seed."""
    done: Done = {}
    specs = [*specs_of(bench), *(bench.working_peers() if with_peers else ())]
    for seed in seeds:
        for spec in specs:
            done.setdefault(spec, {})[seed] = bench.figures(spec, seed)
            print(bench.family, bench.steps, spec, seed, done[spec][seed], flush=True)
    return done


def kept(bench: Bench, seeds: list[int]) -> Done:
    """What is done already."""
    done: Done = {}
    for spec in [*specs_of(bench), *bench.peers]:
        runs = {
            seed: bench.figures(spec, seed) for seed in seeds if bench.path(spec, seed).exists()
        }
        if runs:
            done[spec] = runs
    return done


def thirds(bench: Bench) -> list[tuple[str, str]]:
    """The Delta and the feature map of a third of the blocks, at every place."""
    blocks = len(pared.anatomy.of(denoiser(bench.pipeline)).blocks)
    return [(a.format(third=blocks // 3), b.format(third=blocks // 3)) for a, b in THIRDS]


def row_of(spec: str, runs: list[Figures]) -> Figures:
    """A row of the table: means over the seeds; a column named sd is a spread over them."""
    row = {
        "way": spec,
        "seeds": len(runs),
        "share of multiply-adds": round(runs[0]["cost"], 3),
        "share of time": round(median(run["time"] for run in runs), 3),
        "PSNR": round(mean(run["PSNR"] for run in runs), 2),
        "distance": round(mean(run["distance"] for run in runs), 4),
        "steps at its cost": runs[0]["steps"],
        "PSNR of these": round(mean(run["PSNR of steps"] for run in runs), 2),
        "distance of these": round(mean(run["distance of steps"] for run in runs), 4),
        "nearer than these": nearer(runs),
        "machine": "; ".join(sorted({run["machine"] for run in runs})),
    }
    if len(runs) > 1:
        row["PSNR sd"] = round(stdev(run["PSNR"] for run in runs), 2)
        row["distance sd"] = round(stdev(run["distance"] for run in runs), 4)
    return row


def nearer(runs: list[Figures]) -> str:
    """Whether a way stays nearer to the whole model than fewer steps at its cost, by distance."""
    gains = [run["distance of steps"] - run["distance"] for run in runs]
    if len(gains) < 2:
        return "one seed"
    if abs(mean(gains)) <= stdev(gains):
        return "within the spread"
    return "yes" if mean(gains) > 0 else "no"


def drawn(bench: Bench, rows: list[Figures]) -> dict[str, Any]:
    """Distance against cost: a group for each method, one for fewer steps, one for baselines."""
    fewer = {row["steps at its cost"]: row["distance of these"] for row in rows}
    ways = [(row["way"], row["share of multiply-adds"], row["distance"]) for row in rows]
    ways += [(f"steps: {n}", n / bench.steps, far) for n, far in sorted(fewer.items())]
    # Nothing is as near as the whole model, and no logarithm of its distance is to be had.
    ways = [way for way in ways if way[2] > 0]
    best = pareto([(x, y) for _, x, y in ways], higher=False)
    groups: dict[str, list[tuple[str, float, float]]] = {"fewer steps": []}
    for number, (way, x, y) in enumerate(ways):
        slug, _, settings = way.partition(":")
        group, label = slug, settings or "defaults"
        if slug == "steps":
            group = "fewer steps"
        elif way in grid.plain_reuse(bench.family):
            group, label = "baselines", f"plain, {settings.partition(',')[0]}"
        elif slug not in info.registry():
            group, label = "baselines", slug
        shown = label.strip() if number in best or group == "baselines" else ""
        groups.setdefault(group, []).append((shown, round(x, 3), y))
    return record.points(
        "share of multiply-adds",
        "RMS distance to the whole model's pictures (0.01 is 40 dB)",
        groups,
        log=True,
    )


def decide(bench: Bench, done: Done) -> None:
    """Write the claims that this model decides, as far as their ways are done."""
    about = f"house:{bench.family}, {bench.steps} steps, {len(bench.prompts)} pictures a seed"
    for claim in CLAIMS:
        if claim.family == bench.family:
            claim.write(done, about)
    if bench.family != "pixart":
        return
    pairs = [(done.get(delta, {}), done.get(output, {})) for delta, output in thirds(bench)]
    seeds = set.intersection(*(set(runs) for pair in pairs for runs in pair))
    found = {
        seed: min(output[seed]["distance"] / delta[seed]["distance"] for delta, output in pairs)
        for seed in sorted(seeds)
    }
    note = f"{about}, RMS distance of pictures, a third of the blocks, the least of three places"
    write_claim("delta-dit", "distance-feature-map-over-delta", found, note, machines(pairs[0][0]))


def machines(runs: dict[int, Figures]) -> str:
    """On which machines a way was measured."""
    return "; ".join(sorted({run["machine"] for run in runs.values()}))


def write_claim(
    slug: str, key: str, found: dict[int, float], note: str, machine: str | None = None
) -> None:
    """One claim from its values by seed; nothing where there are none."""
    if not found:
        return
    values = list(found.values())
    spread = stdev(values) if len(values) > 1 else None
    machine = machine or record.describe_machine(DEVICE)
    claim = record.claim(slug, key, mean(values), spread, sorted(found), note, machine)
    record.write(slug, [claim])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of a seed")
    parser.add_argument("--peers", action="store_true", help="caches of other libraries, too")
    parser.add_argument("--kept", action="store_true", help="measure nothing")
    options = parser.parse_args()
    for family in options.family:
        bench = Bench(family, STEPS[family], options.pictures)
        if options.kept:
            done = kept(bench, options.seeds)
        else:
            done = measured(bench, options.seeds, options.peers)
        if not done or not (options.kept or set(SEEDS) <= set(options.seeds)):
            continue
        rows = [row_of(spec, list(runs.values())) for spec, runs in done.items()]
        name = f"{family}, {bench.steps} steps, {options.pictures} pictures a seed"
        figures = {f"{family}, {bench.steps} steps: distance by cost": drawn(bench, rows)}
        record.write("caching", (), {name: rows}, figures)
        decide(bench, done)


if __name__ == "__main__":
    main()
