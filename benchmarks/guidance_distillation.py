"""Guidance learnt as an input, then ever fewer steps, against guidance in two passes.

    python benchmarks/guidance_distillation.py          # forty minutes on one core
    python benchmarks/guidance_distillation.py --quick  # the first stage alone

The teacher is the house PixArt. Distances are of latents, root mean square, to the guided teacher
in many steps from the same noise. Writes claims, tables and curves into
results/guidance-distillation.json; trainings are kept under runs/guidance.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import record
import torch
from torch import Tensor
from torch.nn import Module

import pared
from pared import anatomy
from pared.checkpoint import load, save
from pared.few_step import progressive
from pared.healing import heal, student_of, task_of
from pared.method import denoiser
from pared.nn.diffusion import guided
from pared.objectives.guided import WEIGHT
from pared.objectives.paths import Estimate
from pared.objectives.paths import Path as Way
from pared.training import TrainingSettings
from pared.worlds import emoji
from pared.worlds.datasets import latents_of
from pared.worlds.house import folder_of

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
SLUG, TEACHER, W_MAX = "guidance-distillation", "house:pixart", 7
# Guidance scales, which are 1 + w.
SCALES = (1.0, 2.0, 4.0, 8.0)
STEPS = (1, 2, 4, 8, 16, 32)
# The scale that is drawn.
DRAWN = 4.0
MANY, FIRST = 64, 16


class Bench:
    """Teacher, data, prompts and their noise."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path("runs/guidance")
        self.pipeline = load(folder_of(TEACHER), device=DEVICE)
        self.teacher, self.task = denoiser(self.pipeline), task_of(self.pipeline)
        self.way = Way.of(self.task)
        world = emoji.load(split="train", size=64)
        self.data = latents_of(self.pipeline, world.images, world.captions, drop=0)
        rows = torch.arange(len(world))[:: len(world) // options.prompts][: options.prompts]
        self.condition = {k: v[rows].to(DEVICE) for k, v in self.data.condition.items()}
        self.null = {
            k: v.expand(len(rows), *v.shape).to(DEVICE) for k, v in self.data.empty.items()
        }
        shape = (len(rows), *self.data.latents.shape[1:])
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        self.wanted = {s: self.sampled(self.guided(s), MANY) for s in SCALES}

    def guided(self, scale: float) -> Estimate:
        """The teacher's clean estimate, by two passes."""
        given = self.way.estimate(self.teacher, self.condition)
        null = self.way.estimate(self.teacher, self.null)
        w = torch.tensor(scale - 1)
        return lambda z, t: guided(given(z, t), null(z, t), w)

    def one_pass(self, student: Module, scale: float) -> Estimate:
        """The student's, by one."""
        w = torch.full((len(self.noise),), scale - 1, device=DEVICE)
        return self.way.estimate(student, self.condition | {WEIGHT: w})

    @torch.no_grad()
    def sampled(self, estimate: Estimate, steps: int) -> Tensor:
        """Latents, from the noise that is the same for all."""
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return progressive.sample(estimate, self.noise, self.way, steps).float()

    def distance(self, estimate: Estimate, scale: float, steps: int) -> float:
        """Of the latents to the teacher's in many steps."""
        error = self.sampled(estimate, steps) - self.wanted[scale]
        return float(error.square().mean().sqrt())

    def first_stage(self) -> Module:
        """The teacher with its guidance as an input; trained now if it isn't yet."""
        place = self.folder / "first-model"
        if place.exists():
            return load(place, device=DEVICE)
        student = pared.convert(student_of(self.teacher), pared.GuidanceDistillation(w_max=W_MAX))
        run = heal(
            student, self.teacher, self.data, self.folder / "first", task=self.task,
            **self.settings(self.options.steps).model_dump(),
        )  # fmt: skip
        if not run.finished:
            raise SystemExit(130)
        save(student.eval(), place)
        return student

    def second_stage(self, student: Module) -> dict[int, Module]:
        """Students of ever fewer steps, by their number; each round's is kept."""
        found = {}
        for steps in progressive.halvings(FIRST, 1):
            place = self.folder / f"model-{steps}"
            if not place.exists():
                objective = progressive.Progressive(steps, 0, W_MAX, task=self.task)
                settings = self.settings(self.options.updates)
                place_of_run = self.folder / f"round-{steps}"
                run = progressive.halve(
                    student, objective, self.data, settings, place_of_run, last=steps,
                    final_round_multiplier=1,
                )  # fmt: skip
                if not run.finished:
                    raise SystemExit(130)
                save(student.eval(), place)
            student = found[steps] = load(place, device=DEVICE)
        return found

    def settings(self, steps: int) -> TrainingSettings:
        return TrainingSettings(
            steps=steps, batch_size=self.options.batch_size, schedule="linear",
            learning_rate=self.options.learning_rate, precision="bf16",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of the first stage")
    parser.add_argument("--updates", type=int, default=100, help="of each round of the second")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="the first stage alone")
    options = parser.parse_args()
    bench = Bench(options)
    student, rows = bench.first_stage(), []
    for scale in SCALES:
        for steps in STEPS:
            row = {"guidance scale": scale, "steps": steps}
            row["teacher, two passes"] = bench.distance(bench.guided(scale), scale, steps)
            row["student, one pass"] = bench.distance(bench.one_pass(student, scale), scale, steps)
            row["student at equal cost"] = bench.distance(
                bench.one_pass(student, scale), scale, 2 * steps
            )
            rows.append({k: float(f"{v:.4g}") for k, v in row.items()})
            print(rows[-1], flush=True)
    tables = {f"one pass for two, {options.steps} steps of {options.batch_size}": rows}
    claims = []
    if not options.quick:
        few = []
        # Asked for already: the second stage trains on from this student in place.
        before = {(r["guidance scale"], r["steps"]): r["student, one pass"] for r in rows}
        for steps, model in bench.second_stage(student).items():
            for scale in SCALES:
                row = {"guidance scale": scale, "steps": steps}
                row["teacher, two passes"] = bench.distance(bench.guided(scale), scale, steps)
                row["second stage"] = bench.distance(bench.one_pass(model, scale), scale, steps)
                few.append({k: float(f"{v:.4g}") for k, v in row.items()})
                few[-1]["first stage"] = before[scale, steps]
                print(few[-1], flush=True)
        tables[f"ever fewer steps, {options.updates} updates each"] = few
        note = f"{TEACHER}, latents, the same equal steps in two passes, mean over scales"
        for steps in (2, 4):
            some = [row for row in few if row["steps"] == steps]
            ratios = [row["teacher, two passes"] / row["second stage"] for row in some]
            key, value = f"distance-fast-over-distilled-{steps}", sum(ratios) / len(ratios)
            claims.append(record.claim(SLUG, key, value, None, (0,), note))
    claims.append(record.claim(SLUG, "flops-per-step", flops(bench), None, (0,), "counted"))
    record.write(SLUG, claims, tables, figures_of(*tables.values()))


def figures_of(rows: list[dict[str, float]], few: Sequence[dict[str, float]] = ()) -> dict:
    """Distances by calls of the denoiser at one scale; from the rows of both tables."""
    series = {
        name: [(calls * r["steps"], r[name]) for r in some if r["guidance scale"] == DRAWN]
        for name, calls, some in (
            ("teacher, two passes", 2, rows),
            ("student, one pass", 1, rows),
            ("second stage", 1, sorted(few, key=lambda r: r["steps"])),
        )
    }
    lines = {name: points for name, points in series.items() if points}
    curves = record.curves("calls of the denoiser", "distance of latents", lines)
    return {f"distance to the guided teacher at scale {DRAWN:g}": curves}


def flops(bench: Bench) -> float:
    """Of one guided step, the student's over the teacher's, counted on the house model."""
    from torch.utils.flop_counter import FlopCounterMode

    model = bench.first_stage()
    counts = []
    for counted in (model, bench.teacher):
        family = anatomy.of(counted)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            family.denoise(counted, *family.example())
        counts.append(counter.get_total_flops())
    return counts[0] / (2 * counts[1])


if __name__ == "__main__":
    main()
