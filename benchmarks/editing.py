"""Editing by instruction in one pass against guidance with one, two and three, on the house PixArt.

    python benchmarks/editing.py                        # trains both editors, then measures
    python benchmarks/editing.py --only ec              # trains one, for several processes

Both start from the same teacher and see as many pairs. Writes claims, tables and figures into
results/explicit-conditioning.json. What is done is kept under runs/editing.
"""

import argparse
import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import record
import torch
from painting import repainted
from torch.nn import Module

import pared
from pared.bench import edits as marks
from pared.bench.judge import judge_of
from pared.checkpoint import load, save
from pared.healing import heal, student_of, task_of
from pared.method import denoiser, replace_denoiser
from pared.tasks.data import TaskData
from pared.worlds.emoji.edits import NEAR, edits
from pared.worlds.emoji.pixels import FAR
from pared.worlds.house import folder_of

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
SLUG, TEACHER, SIZE = "explicit-conditioning", "house:pixart", 64
EDITORS = {
    "guidance": 'picture-input:tasks=["text-to-image","edit"]',
    "ec": SLUG,
    "ec-context": f"{SLUG}:concat_context=true",
}
# Scales of picture and prompt; the paper's settings for one, two and three passes.
ARMS = {
    "guidance, 1 pass": ("guidance", 1.0, 1.0),
    "guidance, 2 passes": ("guidance", 1.0, 7.5),
    "guidance, 3 passes": ("guidance", 1.6, 7.5),
    "guidance, 3 passes, weak": ("guidance", 1.2, 2.0),
    "EC": ("ec", 1.0, 1.0),
    "EC with the picture too": ("ec-context", 1.0, 1.0),
}
STEPS = (1, 2, 4, 8, 16, 32, 50)
# The number of steps at which the claims are decided.
DECIDED = 16

Figures = dict[str, Any]


class Bench:
    """Pairs, a pipeline to paint with, the editors, and what they are measured on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path("runs/editing") / f"{options.steps}x{options.batch_size}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pipeline = load(folder_of(TEACHER), device=DEVICE)
        self.pipeline.set_progress_bar_config(disable=True)
        self.teacher, self.task = denoiser(self.pipeline), task_of(self.pipeline)
        self.judge = judge_of("house:judge")
        self.editors: dict[str, Module] = {}
        self.pairs = {
            "near": edits(size=SIZE, split="heldout", count=options.pictures, kinds=NEAR),
            "far": edits(size=SIZE, split="heldout", count=options.pictures, kinds=tuple(FAR)),
        }

    @cached_property
    def data(self) -> TaskData:
        """Pairs to learn from, encoded once for all editors."""
        return TaskData(self.pipeline, [edits(SIZE, "train", self.options.examples)])

    def editor(self, name: str) -> Module:
        """A trained editor; trained now if it isn't yet."""
        place = self.folder / name / "model"
        if place.exists():
            return load(place, device=DEVICE)
        method = pared.parse(EDITORS[name])
        torch.manual_seed(0)
        student = pared.convert(student_of(self.teacher), method)
        data = self.data.only(["edit"], method.tasks)
        data.drop = name == "guidance"  # which needs passes without prompt or picture
        run = heal(
            student,
            self.teacher,
            data,
            self.folder / name,
            task=self.task,
            steps=self.options.steps,
            batch_size=self.options.batch_size,
            learning_rate=self.options.learning_rate,
            warmup=10,
            schedule="cosine",
            precision="bf16",
        )
        if not run.finished:
            raise SystemExit(130)
        save(student.eval(), place)
        return student

    def painted(self, arm: str, kind: str, steps: int, seed: int = 0) -> tuple[torch.Tensor, float]:
        """Edits of all held-out pairs of a kind, and seconds per picture."""
        name, image_scale, text_scale = ARMS[arm]
        replace_denoiser(self.pipeline, self.editors[name])
        start = time.perf_counter()
        found = repainted(
            self.pipeline, "edit", self.pairs[kind], steps, seed,
            guidance=text_scale, image_guidance=image_scale,
        )  # fmt: skip
        return found, (time.perf_counter() - start) / len(found)

    def figures(self, arm: str, kind: str, steps: int) -> Figures:
        """How good an arm's edits are, over the seeds; kept once they are there."""
        path = self.folder / f"{arm.replace(', ', '-').replace(' ', '-')}-{kind}-{steps}.json"
        if path.exists():
            return json.loads(path.read_text())
        pairs, runs = self.pairs[kind], []
        given, target = (pairs.images[rows].float() / 255 for rows in (pairs.before, pairs.after))
        for seed in range(self.options.seeds):
            pictures, seconds = self.painted(arm, kind, steps, seed)
            runs.append((pictures, seconds))
        found: Figures = {"machine": record.describe_machine(DEVICE)}
        for name, measure in {
            "DCS": lambda x: marks.average(
                marks.caption_direction(self.judge, given, x, pairs.captions)
            )[0],
            "DVS": lambda x: marks.average(marks.target_direction(self.judge, given, x, target))[0],
            "squared error": lambda x: float(marks.closeness(x, target)["mse"].mean()),
        }.items():
            found[name] = [measure(pictures) for pictures, _ in runs]
        found["seconds per picture"] = [seconds for _, seconds in runs]
        if len(runs) > 1:
            spread = marks.diversity(self.judge, torch.stack([x for x, _ in runs]))
            found["diversity"] = float(spread["features"].mean())
        path.write_text(json.dumps(found))
        return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def row_of(arm: str, steps: int, found: Figures) -> Figures:
    """One row: means over seeds."""
    row: Figures = {"editor": arm, "steps": steps}
    for name in ("DCS", "DVS", "squared error", "seconds per picture"):
        row[name] = float(f"{mean(found[name]):.4g}")
    if "diversity" in found:
        row["diversity"] = float(f"{found['diversity']:.3g}")
    return row


def figures_of(rows: list[Figures]) -> Figures:
    """What is drawn, from the rows of the table of near edits."""
    curves: Figures = {}
    points: Figures = {}
    for row in rows:
        editor, steps, error = row["editor"], row["steps"], row["squared error"]
        time_ = float(f"{1000 * row['seconds per picture']:.4g}")
        curves.setdefault(editor, []).append((steps, error))
        points.setdefault(editor, []).append((str(steps), time_, error))
    x, y = "milliseconds per picture", "squared error in pixels"
    return {
        "error of edits": record.curves("steps", y, curves),
        "error of edits against time, by number of steps": record.points(x, y, points, log=True),
    }


def claims_of(near: dict[tuple[str, int], Figures], budget: str) -> list:
    """EC against guidance at the deciding number of steps; the best of the three-pass settings."""
    ours = near["EC", DECIDED]
    three = max(
        (near[arm, DECIDED] for arm in ARMS if arm.startswith("guidance, 3")),
        key=lambda found: mean(found["DVS"]),
    )
    one = near["guidance, 1 pass", DECIDED]
    note = (
        f"{TEACHER}, both trained for {budget}, {DECIDED} steps, held-out pairs; guidance with the "
        "better of two pairs of scales"
    )
    claims = []
    for key, mark, under in (
        ("text-direction-over-guidance", "DCS", three),
        ("visual-direction-over-guidance", "DVS", three),
        ("text-direction-over-one-pass", "DCS", one),
    ):
        found = [a / b for a, b in zip(ours[mark], under[mark], strict=True)]
        seeds = range(len(found))
        spread = torch.tensor(found).std().item() if len(found) > 1 else None
        claims.append(record.claim(SLUG, key, mean(found), spread, seeds, note, ours["machine"]))
    ratio = mean(three["seconds per picture"]) / mean(ours["seconds per picture"])
    claims.append(record.claim(SLUG, "speedup", ratio, None, (0,), note, ours["machine"]))
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--examples", type=int, default=3000, help="pairs to learn from")
    parser.add_argument("--pictures", type=int, default=48, help="held-out pairs of a kind")
    parser.add_argument("--seeds", type=int, default=2, help="of sampling")
    parser.add_argument("--only", nargs="*", choices=EDITORS, help="train these and stop")
    options = parser.parse_args()
    bench = Bench(options)
    bench.editors = {name: bench.editor(name) for name in options.only or EDITORS}
    if options.only:
        return
    budget = f"{options.steps} steps of {options.batch_size} pairs"
    near = {(arm, n): bench.figures(arm, "near", n) for arm in ARMS for n in STEPS}
    far = {(arm, n): bench.figures(arm, "far", n) for arm in ARMS for n in (1, DECIDED)}
    rows = [row_of(arm, n, found) for (arm, n), found in near.items()]
    tables = {
        f"near edits, {budget}": rows,
        f"far edits, {budget}": [row_of(arm, n, found) for (arm, n), found in far.items()],
    }
    record.write(SLUG, claims_of(near, budget), tables, figures_of(rows))


if __name__ == "__main__":
    main()
