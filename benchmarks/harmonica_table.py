"""Measures what a learned table of HarmoniCa saves, and what it costs in quality, on house:pixart.

    python benchmarks/harmonica_table.py                  # on two cores: twenty minutes
    python benchmarks/harmonica_table.py --updates 5000   # longer; learning goes on where it was

Learns the table as `pared route` does, beside tables that reuse as much at a fixed interval and at
random; paints the same pictures with each; writes claims and tables into results/harmonica.json.
The table, its training and what is painted are kept under runs/harmonica.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import record
import torch
from painting import OF_PIXART, painted

import pared
from caching import GUIDANCE, Bench, distance
from pared.bench import grid
from pared.bench.distances import frechet, median_bandwidth, mmd
from pared.bench.judge import judge_of
from pared.bench.timing import Timings, interleave
from pared.caching.harmonica_tables import Routing
from pared.caching.harmonica_training import learn
from pared.caching.trajectory import conditions_of
from pared.worlds import emoji

SLUG, FAMILY, STEPS = "harmonica", "pixart", 20
FOLDER = Path("runs") / SLUG
# Seeds of pictures and of time; the table is learned on other noise.
SEEDS = (0, 1, 2)


def learned(bench: Bench, options: argparse.Namespace) -> Path:
    """The file of the learned table."""
    captions = emoji.load(split="train", size=None).captions
    name = f"{FAMILY}-{STEPS}-{options.target_reuse}x{options.batch_size}"
    found = learn(
        bench.pipeline,
        conditions_of(bench.pipeline, captions[:: max(1, len(captions) // 256)]),
        FOLDER / name,
        model=f"house:{FAMILY}",
        steps=STEPS,
        guidance=GUIDANCE,
        target_reuse=options.target_reuse,
        batch_size=options.batch_size,
        updates=options.updates,
        learning_rate=0.05,
    )
    if not found.run.finished:
        raise SystemExit(130)
    # Under a name of its own for each length of training, by which figures are kept.
    return found.routing.save(FOLDER / f"{name}-{options.updates}.safetensors")


def rivals(table: Path, cur: float) -> dict[str, str]:
    """Specs of tables that reuse about as much, by name."""
    interval = max(2, round(1 / (1 - cur)))
    return {
        "learned": f"harmonica:router={table}",
        f"interval of {interval}": f"harmonica:table=interval:{interval}",
        "random": f"harmonica:table=random:{cur:.3f}:0",
    }


def far(bench: Bench, spec: str) -> dict[str, float]:
    """Share of multiply-adds, and distance to the whole model's pictures, mean over seeds."""
    far = [distance(bench.painted(spec, s)[0], bench.alone(s, STEPS)[0]) for s in SEEDS]
    return {
        "share of multiply-adds": round(bench.macs(spec) / bench.cost, 3),
        "distance": round(sum(far) / len(far), 4),
    }


def timed(bench: Bench, spec: str, rounds: int, count: int) -> Timings:
    """Runs of the whole model and with the table, in turn; latents alone."""

    def run() -> None:
        noise = [torch.Generator().manual_seed(i) for i in range(count)]
        bench.pipeline(
            bench.prompts[:count],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=noise,
            height=64,
            width=64,
            output_type="latent",
            **OF_PIXART,
        )

    attached = partial(pared.apply, bench.pipeline, *grid.methods_of((spec,)))
    return interleave({"whole": run, "table": run}, rounds, 1, "whole", around={"table": attached})


def to_real(bench: Bench, spec: str, count: int) -> dict[str, dict[str, float]]:
    """Distances to real pictures of the same captions, whole and with the table."""
    path = FOLDER / f"to-real-{Path(spec).stem}-{count}.json"
    if not path.exists():
        world, judge = emoji.load(split="train", size=64), judge_of("house:judge")
        rows = torch.arange(0, len(world.captions), max(1, len(world.captions) // count))[:count]
        real = judge.of_images(world.images[rows].float() / 255)
        bandwidth = median_bandwidth(real)
        found = {}
        for name, methods in (("whole", ()), ("learned", grid.methods_of((spec,)))):
            with pared.apply(bench.pipeline, *methods):
                prompts = [world.captions[i] for i in rows]
                seen = judge.of_images(painted(bench.pipeline, prompts, STEPS, GUIDANCE))
            near = mmd(seen, real, bandwidth=bandwidth)
            found[name] = {"Frechet": frechet(seen, real), "MMD x1000": 1000 * near}
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=1000, help="of single steps")
    parser.add_argument("--batch-size", type=int, default=2, help="of trajectories")
    parser.add_argument("--target-reuse", type=float, default=0.5)
    parser.add_argument("--pictures", type=int, default=8, help="of a seed")
    parser.add_argument("--painted", type=int, default=200, help="for the distances to real")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    options = parser.parse_args()
    bench = Bench(FAMILY, STEPS, options.pictures)
    table = learned(bench, options)
    cur = Routing.load(table).cur
    rows = [{"table": n} | far(bench, spec) for n, spec in rivals(table, cur).items()]
    for row in rows:
        print(row, flush=True)
    spec = rivals(table, cur)["learned"]
    times = timed(bench, spec, options.rounds, options.pictures)
    print({name: timing.median for name, timing in times.items()}, times.verdict.notes, flush=True)
    real = to_real(bench, spec, options.painted)
    print(real, flush=True)

    about = (
        f"house:{FAMILY}, {STEPS} steps, guided; table of {options.updates} updates on "
        f"{options.batch_size} samples, which reuses {cur:.0%}"
    )
    ours = times["table"]
    quality = real["learned"]["Frechet"] / real["whole"]["Frechet"]
    pictures = f"{options.painted} pictures"
    counted = bench.cost / bench.macs(spec)
    spread = (ours.ratio_high - ours.ratio_low) / 2
    machine = record.describe_machine(bench.pipeline.device)
    claims = [
        record.claim(SLUG, "theoretical-speed-up", counted, None, (0,), about, machine),
        record.claim(SLUG, "measured-speed-up", ours.ratio, spread, (0,), about, machine),
        record.claim(
            SLUG, "frechet-over-base", quality, None, (0,), f"{about}; {pictures}", machine
        ),
    ]
    tables = {
        f"tables that reuse as much, {STEPS} steps": rows,
        f"{options.painted} pictures against real ones": [
            {"run": name} | {mark: float(f"{value:.4g}") for mark, value in marks.items()}
            for name, marks in real.items()
        ],
    }
    record.write(SLUG, claims, tables)


if __name__ == "__main__":
    main()
