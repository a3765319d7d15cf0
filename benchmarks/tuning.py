"""Taking the house PixArt to another domain with few weights: DiffFit against its rivals.

    python benchmarks/tuning.py                       # 25 minutes on one core
    python benchmarks/tuning.py --only difffit lora   # some, for several processes
    python benchmarks/tuning.py --kept                # sum up what is done

The base is a transformer, as the paper's is: all seven places of DiffFit are in each of its blocks,
while most of the house U-Net is convolutions, which get no gamma. The domain is the emoji world
with red and blue swapped, and mirrored. Captions still say what is shown, and the autoencoder, of
which nothing trains, keeps such pictures (29 dB); of dark grounds, as negatives have them, it keeps
little (13 dB). The judge sees the colours and hardly the mirroring, the held-out loss sees both.
Every way of adapting has a learning rate of its own, the best of three on pictures kept aside, each
tried for half of the steps. LoRA is where the paper's is, on queries, keys and values: there rank
16 and the label table make its 2.18M weights of DiT-XL/2.

Writes claims, tables and a figure into results/difffit.json. What is done is kept under
runs/tuning.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import painting
import record
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_

import pared
from pared import anatomy
from pared.bench.distances import frechet, median_bandwidth, mmd
from pared.bench.judge import judge_of
from pared.bench.timing import interleave
from pared.checkpoint import load
from pared.healing import student_of, task_of
from pared.method import denoiser, replace_denoiser, stack_of
from pared.training import TrainingSettings, train
from pared.tuning.adapters import save_adapter
from pared.tuning.difffit_checks import published_dit
from pared.worlds import emoji
from pared.worlds.datasets import LatentData, latents_of
from pared.worlds.emoji import Emoji
from pared.worlds.house import folder_of

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
SLUG, TEACHER, SIZE = "difffit", "house:pixart", 64
# Noises and times per held-out picture.
DRAWS = 2
# How often a training step is timed.
ROUNDS = 10
# Parameters that the published DiT-XL/2 counts, and diffusers doesn't: its table of positions.
POSITIONS = 256 * 1152

Figures = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to adapt the base.

    Attributes:
        words: what tables call it.
        method: spec of an adapter; None trains all weights.
        rates: of learning, of which the best is taken; none takes that of "full".
    """

    words: str
    method: str | None
    rates: tuple[float, ...] = ()


ARMS = {
    "full": Arm("all weights", None, (1e-4, 3e-4, 1e-3)),
    "difffit": Arm("DiffFit", "difffit", (3e-3, 1e-2, 3e-2)),
    "bitfit": Arm("BitFit", "difffit:locations=[]", (3e-3, 1e-2, 3e-2)),
    "lora": Arm("LoRA, rank 16", 'lora:r=16,places=["q","k","v"]', (3e-3, 1e-2, 3e-2)),
    "ia3": Arm("IA3", "ia3", (1e-2, 3e-2, 1e-1)),
    "difffit-slow": Arm("DiffFit at the rate for all weights", "difffit"),
}
# What the claims hang on runs with every seed, the rest with one.
DECISIVE = ("full", "difffit", "bitfit", "lora")


def changed(images: Tensor) -> Tensor:
    """The pictures of the other domain, uint8 (count, 3, height, width)."""
    return images.flip(1, -1)


class Bench:
    """The base, the pictures of the domain, and what everything is measured on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        budget = f"{options.steps}x{options.batch_size}-{options.pictures}"
        self.folder = Path("runs/tuning") / budget
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pipeline = load(folder_of(TEACHER), device=DEVICE)
        self.pipeline.set_progress_bar_config(disable=True)
        self.base, self.objective = denoiser(self.pipeline), task_of(self.pipeline)
        self.judge = judge_of("house:judge")
        world = emoji.load("heldout", SIZE)
        count = min(options.pictures, len(world))
        world = world.select(torch.arange(count) * len(world) // count)
        self.captions, self.held_out = world.captions, self.encoded(world)
        self.real = self.judge.of_images(changed(world.images).float() / 255)

    def encoded(self, world: Emoji) -> LatentData:
        """Captioned pictures, taken to the domain. Painting without guidance drops no caption."""
        return latents_of(self.pipeline, changed(world.images), world.captions, drop=0)

    @cached_property
    def _train(self) -> tuple[Emoji, Tensor]:
        """The training part of the world, and a random order of it."""
        world = emoji.load("train", SIZE)
        return world, torch.randperm(len(world), generator=torch.Generator().manual_seed(0))

    @cached_property
    def data(self) -> LatentData:
        """What is learnt from."""
        world, order = self._train
        return self.encoded(world.select(order[: self.options.examples]))

    @cached_property
    def aside(self) -> LatentData:
        """What learning rates are chosen on; of the training part, without any that trains."""
        world, order = self._train
        return self.encoded(world.select(order[self.options.examples :][: self.options.pictures]))

    def converted(self, name: str) -> Module:
        """The base with an arm's adapter, ready to train."""
        student, spec = student_of(self.base), ARMS[name].method
        return student if spec is None else pared.convert(student, pared.parse(spec))

    def trained(self, name: str, rate: float, steps: int, seed: int, folder: Path) -> Module:
        """The base adapted in one way."""
        torch.manual_seed(seed)
        student = self.converted(name)
        family = anatomy.of(student)
        patterns = tuple(p for method in stack_of(student) for p in method.trainable(family))
        settings = TrainingSettings(
            steps=steps,
            batch_size=self.options.batch_size,
            learning_rate=rate,
            warmup=steps // 10,
            schedule="cosine",
            precision="bf16",
            trainable=patterns or ("*",),
            seed=seed,
        )
        if not train(student, self.objective, self.data, settings, folder).finished:
            raise SystemExit(130)
        # The checkpoints of all runs would take gigabytes.
        shutil.rmtree(folder)
        return student.eval()

    def tried(self, name: str) -> dict[float, float]:
        """Loss on the pictures kept aside by learning rate; kept once they are there."""
        losses = {}
        for rate in ARMS[name].rates:
            path = self.folder / f"{name}-at-{rate:g}.json"
            if not path.exists():
                steps, place = max(1, self.options.steps // 2), self.folder / path.stem
                model = self.trained(name, rate, steps, 0, place)
                path.write_text(json.dumps(self.loss(model, self.aside)))
            losses[rate] = json.loads(path.read_text())
        return losses

    def rate(self, name: str) -> float:
        """The learning rate of an arm."""
        losses = self.tried(name if ARMS[name].rates else "full")
        return min(losses, key=losses.__getitem__)

    def done(self, name: str, seed: int) -> Figures:
        """The figures of an arm; kept once they are there."""
        path = self.folder / f"{name}-{seed}.json"
        if path.exists():
            return json.loads(path.read_text())
        rate = self.rate(name)
        student = self.trained(name, rate, self.options.steps, seed, self.folder / path.stem)
        figures: Figures = {
            "learning rate": rate,
            "trained": sum(p.numel() for p in student.parameters() if p.requires_grad),
            "bytes": sum(t.nbytes for t in student.state_dict().values()),
        }
        if stack_of(student):
            file = save_adapter(student, path.with_suffix(".safetensors"))
            figures["bytes"] = file.stat().st_size
        figures |= self.measured(student)
        path.write_text(json.dumps(figures))
        return figures

    def measured(self, model: Module) -> Figures:
        """How far a model is from the held-out pictures of the domain."""
        replace_denoiser(self.pipeline, model)
        # Without guidance: the model's own distribution, and half the time.
        pictures = painting.painted(
            self.pipeline, self.captions, self.options.sampling_steps, guidance=1.0
        )
        replace_denoiser(self.pipeline, self.base)
        return {"held-out loss": self.loss(model, self.held_out)} | self.distances(pictures)

    def distances(self, pictures: Tensor) -> Figures:
        """Distances of pictures (count, 3, height, width) in [0, 1] to those of the domain."""
        seen = self.judge.of_images(pictures)
        bandwidth = median_bandwidth(self.real)
        return {
            "Frechet": frechet(seen, self.real),
            "MMD x1000": 1000 * mmd(seen, self.real, bandwidth=bandwidth),
            "machine": record.describe_machine(DEVICE),
        }

    @torch.no_grad()
    def loss(self, model: Module, data: LatentData) -> float:
        """The denoising loss, with noise and times that are always the same."""
        generator, total = torch.Generator().manual_seed(0), 0.0
        rows = torch.arange(len(data)).repeat(DRAWS)
        for some in rows.split(32):
            batch = {k: v.to(DEVICE) for k, v in data.batch(some, generator).items()}
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = self.objective(model, batch, generator)["task"]
            total += float(loss) * len(some) / len(rows)
        return total

    @torch.no_grad()
    def reconstructed(self) -> Tensor:
        """What the autoencoder keeps of the held-out pictures: nothing painted comes nearer."""
        vae = self.pipeline.vae
        latents = self.held_out.latents.to(DEVICE) / vae.config.scaling_factor
        return torch.cat([vae.decode(x).sample / 2 + 0.5 for x in latents.split(32)]).clamp(0, 1)

    def step_times(self) -> Figures:
        """Seconds of a training step of every arm, in turns; kept once they are there."""
        path = self.folder / "step-times.json"
        if path.exists():
            return json.loads(path.read_text())
        calls = {name: self.step(name) for name, arm in ARMS.items() if arm.rates}
        timings = interleave(calls, ROUNDS, warmup=2, base="full")
        ours = timings["difffit"]
        found: Figures = {
            "seconds": {name: timing.median for name, timing in timings.items()},
            "ratio": ours.ratio,
            "spread": (ours.ratio_high - ours.ratio_low) / 2,
            "notes": timings.verdict.notes,
            "machine": record.describe_machine(DEVICE),
        }
        path.write_text(json.dumps(found))
        return found

    def step(self, name: str) -> Callable[[], None]:
        """One training step, on a batch that is always the same."""
        student = self.converted(name).train()
        weights = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0)
        rows, generator = torch.arange(self.options.batch_size), torch.Generator()
        batch = {k: v.to(DEVICE) for k, v in self.data.batch(rows, generator).items()}

        def once() -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = self.objective(student, batch, generator)["task"]
            loss.backward()
            clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return once


def counted() -> tuple[Any, list[Figures]]:
    """What DiffFit trains of the published DiT-XL/2, label table included: claim and table."""
    whole = sum(p.numel() for p in published_dit(1000).parameters()) + POSITIONS
    rows = []
    for locations in ([], "blocks", "blocks+qkv", "full"):
        model = pared.convert(published_dit(101), pared.DiffFit(locations=locations))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = f"{trained / whole:.4%}"
        rows.append({"gammas": locations or "none: BitFit", "trained": trained, "share": share})
    note = f"counted: {trained:,} of {whole:,}"
    claim = record.claim(SLUG, "share-of-parameters", trained / whole, None, (0,), note)
    return claim, rows


def row_of(words: str, runs: list[Figures], whole: int, seconds: float | None) -> Figures:
    """One row: means over seeds, with the spread of what differs."""
    row: Figures = {"model": words, "seeds": len(runs)}
    if trained := runs[0].get("trained"):
        row |= {"learning rate": runs[0]["learning rate"], "trained": trained}
        row["share of the weights (%)"] = float(f"{100 * trained / whole:.3g}")
        row["to keep (MiB)"] = float(f"{runs[0]['bytes'] / 2**20:.3g}")
    if seconds is not None:
        row["training step (s)"] = float(f"{seconds:.3g}")
    for key in ("held-out loss", "Frechet", "MMD x1000"):
        if key in runs[0]:
            values = [run[key] for run in runs]
            row[key] = float(f"{statistics.mean(values):.4g}")
            if len(values) > 1:
                row[f"{key} sd"] = float(f"{statistics.stdev(values):.2g}")
    return row | {"machine": "; ".join(sorted({str(run["machine"]) for run in runs}))}


def distance_claims(done: dict[str, list[Figures]], budget: str) -> list:
    """The rivals' distances over DiffFit's, seed by seed."""
    ours, claims = done.get("difffit", []), []
    for rival in ("full", "bitfit", "lora"):
        pairs = zip(done.get(rival, []), ours, strict=False)
        found = [theirs["Frechet"] / mine["Frechet"] for theirs, mine in pairs]
        if not found:
            continue
        spread = statistics.stdev(found) if len(found) > 1 else None
        note = (
            f"Frechet distance of the judge's features; {TEACHER}, mirrored emoji with red and "
            f"blue swapped, {budget}, held-out captions"
        )
        key, seeds = f"distance-{rival}-over-difffit", range(len(found))
        mean = statistics.mean(found)
        claims.append(record.claim(SLUG, key, mean, spread, seeds, note, ours[0]["machine"]))
    return claims


def step_claim(times: Figures, batch_size: int) -> Any:
    """The time of a training step of all weights over DiffFit's."""
    note = f"{TEACHER}, {batch_size} pictures, {ROUNDS} interleaved rounds"
    return record.claim(
        SLUG,
        "step-time-full-over-difffit",
        times["ratio"],
        times["spread"],
        (0,),
        ". ".join([note, *times["notes"]]),
        times["machine"],
    )


def tried_table(bench: Bench, names: list[str]) -> list[Figures]:
    """The loss by learning rate, and which one was taken."""
    return [
        {
            "model": ARMS[name].words,
            "learning rate": rate,
            "loss": float(f"{loss:.4g}"),
            "taken": "yes" if rate == bench.rate(name) else "",
        }
        for name in names
        for rate, loss in bench.tried(name).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--examples", type=int, default=1000, help="to learn from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=96, help="held-out captions to paint")
    parser.add_argument("--sampling-steps", type=int, default=12)
    parser.add_argument("--only", nargs="*", choices=ARMS, help="train these and stop")
    parser.add_argument("--kept", action="store_true", help="train nothing, sum up what is done")
    options = parser.parse_args()
    bench = Bench(options)
    done: dict[str, list[Figures]] = {}
    for seed in range(options.seeds):
        for name in ARMS:
            kept = (bench.folder / f"{name}-{seed}.json").exists()
            skipped = (options.only and name not in options.only) or (options.kept and not kept)
            if skipped or (seed and name not in DECISIVE):
                continue
            done.setdefault(name, []).append(bench.done(name, seed))
            print(name, seed, done[name][-1], flush=True)
    if options.only:
        return
    times = bench.step_times()
    budget = f"{options.steps} steps of {options.batch_size} pictures"
    whole = sum(p.numel() for p in bench.base.parameters())
    rows = [
        row_of("base", [bench.measured(bench.base)], whole, None),
        *(row_of(ARMS[n].words, r, whole, times["seconds"].get(n)) for n, r in done.items()),
        row_of("the pictures themselves", [bench.distances(bench.reconstructed())], whole, None),
    ]
    share, layouts = counted()
    tables = {
        f"another domain, {budget}": rows,
        "learning rates, tried for half of the steps": tried_table(
            bench, [name for name in done if ARMS[name].rates]
        ),
        "what trains of DiT-XL/2 for Food-101": layouts,
    }
    points = [(r["model"], r["trained"], r["Frechet"]) for r in rows if "trained" in r]
    x, y = "parameters trained", "Frechet distance to the domain"
    figures = {"distance by parameters trained": record.points(x, y, {TEACHER: points}, log=True)}
    claims = [share, *distance_claims(done, budget), step_claim(times, options.batch_size)]
    record.write(SLUG, claims, tables, figures)


if __name__ == "__main__":
    main()
