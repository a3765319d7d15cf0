"""One model that paints, edits in one pass, upscales and removes, against one model for each.

    python benchmarks/all_in_one.py        # house:tasks; under an hour on one core
    python benchmarks/all_in_one.py --model runs/tasks/model

The rival is what a product keeps today: the house PixArt with softmax attention for painting, and
three fine-tunes of it, each trained on its own task for as many steps on as many examples as the
one model saw of that task; to edit it takes three passes a step. Both answer the same held-out
requests from the same noise. Writes the table into results/all-in-one.json and the pictures into
docs/all-in-one.svg. What is trained is kept under runs/all-in-one.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from all_in_one_picture import Line, drawn
from marks import marks_of
from painting import repainted
from torch import Tensor
from torch.nn import Module

import pared
from pared import recipe, results
from pared.bench import metering
from pared.bench.judge import judge_of
from pared.bench.timing import interleave
from pared.checkpoint import load, save
from pared.guidance import classifier_free
from pared.healing import student_of, task_of
from pared.method import denoiser, replace_denoiser
from pared.tasks.data import TaskData
from pared.tasks.sampling import sample
from pared.training import train
from pared.worlds.emoji.edits import MAKERS
from pared.worlds.house import folder_of
from pared.worlds.tasks import Examples

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
TEACHER, SIZE, STEPS, FEW = "house:pixart", 64, 16, 4
RECIPE = record.ROOT / "recipes" / "house" / "tasks.toml"
PICTURE = record.ROOT / "docs" / "all-in-one.svg"
TASKS = tuple(MAKERS)
# Scales of prompt and given picture; those of editing did best in benchmarks/editing.py.
PAINT = {"guidance": 4.0}
NAIVE = {"text-to-image": PAINT, "edit": {"guidance": 2.0, "image_guidance": 1.2}}
OURS = {"text-to-image": PAINT}
# Figures of which a task is judged by, best first.
MARKS = {
    "text-to-image": ("Frechet to real",),
    "edit": ("DCS", "DVS", "squared error"),
    "upscale": ("judge's distance to truth", "squared error"),
    "inpaint": ("squared error", "judge's distance to truth"),
}

# How many requests are shown, and which aren't.
SHOWN = {"text-to-image": 2, "edit": 4, "upscale": 2, "inpaint": 2}
UNFIT = ("middle finger",)

Figures = dict[str, Any]


class Bench:
    """Both products, and the held-out requests that they answer."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.plan = recipe.read(RECIPE).stages[0].training
        steps = options.steps or self.plan.steps
        self.folder = Path("runs/all-in-one") / f"{steps}x{self.rows}"
        self.pipeline = load(folder_of(TEACHER), device=DEVICE)
        self.pipeline.set_progress_bar_config(disable=True)
        self.teacher, self.task = denoiser(self.pipeline), task_of(self.pipeline)
        warmup = min(self.plan.warmup, steps // 10)
        self.settings = self.plan.model_copy(
            update={"steps": steps, "batch_size": self.rows, "warmup": warmup}
        )
        self.judge = judge_of("house:judge")
        self.requests = {
            task: make(size=SIZE, split="heldout", count=options.pictures)
            for task, make in MAKERS.items()
        }

    @property
    def rows(self) -> int:
        """Examples of one task in a batch of the one model."""
        return self.plan.batch_size // len(TASKS)

    def naive(self, task: str) -> Module:
        """The model of one task; trained now if it isn't yet."""
        if task == "text-to-image":
            return self.teacher
        place = self.folder / task / "model"
        if place.exists():
            return load(place, device=DEVICE)
        torch.manual_seed(0)
        method = pared.parse(f'picture-input:tasks=["text-to-image","{task}"]')
        student = pared.convert(student_of(self.teacher), method)
        data = TaskData(self.pipeline, [MAKERS[task](SIZE)], tasks=method.tasks)
        if not train(student, self.task, data, self.settings, self.folder / task).finished:
            raise SystemExit(130)
        save(student.eval(), place)
        return student

    def answered(self, model: Module, task: str, steps: int, seed: int, scales: Figures) -> Tensor:
        """What a model makes of all held-out requests of a task."""
        replace_denoiser(self.pipeline, model)
        return repainted(self.pipeline, task, self.requests[task], steps, seed, **scales)

    def marks(self, model: Module, task: str, steps: int, scales: Figures) -> Figures:
        """How good its answers are, means over the seeds."""
        runs = [
            marks_of(self.judge, self.requests[task], self.answered(model, task, steps, n, scales))
            for n in range(self.options.seeds)
        ]
        return {k: statistics.mean(run[k] for run in runs) for k in MARKS[task]}

    def macs(self, model: Module, task: str, steps: int, scales: Figures) -> float:
        """Multiply-adds of the denoiser for one answer."""
        count = metering.count(self.call(model, task, steps, scales), denoiser(self.pipeline))
        return count.total - count.macs.get(metering.OUTSIDE, 0)

    def call(self, model: Module, task: str, steps: int, scales: Figures) -> Callable[[], Tensor]:
        """One request, answered as a user would have it."""
        replace_denoiser(self.pipeline, model)
        request = self.requests[task]
        given = request.images[[request.before[0]]] if request.before else None
        return lambda: sample(
            self.pipeline, task, [request.texts[0]], given, steps, size=(SIZE, SIZE), **scales
        )

    def seconds(self, arms: dict[str, tuple[Module, int, Figures]], task: str) -> dict[str, float]:
        """Of one request, all arms taking turns."""

        def timed(model: Module, steps: int, scales: Figures) -> Callable[[], Tensor]:
            return lambda: self.call(model, task, steps, scales)()

        calls = {name: timed(*arm) for name, arm in arms.items()}
        found = interleave(calls, self.options.rounds, warmup=1, base="naive")
        return {name: timing.median for name, timing in found.items()}


def rows_of(bench: Bench, ours: Module) -> list[Figures]:
    """A row for each task and product."""
    rows = []
    for task in TASKS:
        scales = OURS.get(task, {})
        arms = {
            "naive": (bench.naive(task), STEPS, NAIVE.get(task, {})),
            "all in one": (ours, STEPS, scales),
            f"all in one, {FEW} steps": (ours, FEW, scales),
        }
        if task == "text-to-image":  # few steps are for what starts at the given picture
            arms.popitem()
        seconds = bench.seconds(arms, task)
        for name, arm in arms.items():
            row: Figures = {"task": task, "product": name, "steps": arm[1]}
            row["passes"] = len(_passes(arm[2]))
            row["GMACs"] = bench.macs(arm[0], task, *arm[1:]) / 1e9
            row["milliseconds"] = 1e3 * seconds[name]
            row |= bench.marks(arm[0], task, *arm[1:])
            rows.append({k: _rounded(v) for k, v in row.items()})
            print(rows[-1], flush=True)
    return rows


def _passes(scales: Figures) -> tuple[str, ...]:
    return classifier_free.passes(scales.get("image_guidance", 1.0), scales.get("guidance", 1.0))


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def kept(bench: Bench, ours: Module) -> list[Figures]:
    """What each product keeps: denoisers, their parameters, their size in half precision."""
    found = []
    for name, models in {
        "naive": [bench.naive(task) for task in TASKS],
        "all in one": [ours],
    }.items():
        count = sum(p.numel() for model in models for p in model.parameters())
        found.append(
            {
                "product": name,
                "denoisers": len(models),
                "parameters (M)": round(count / 1e6, 2),
                "MiB in float16": round(2 * count / 2**20, 1),
            }
        )
    return found


def lines(bench: Bench, ours: Module) -> list[Line]:
    """A few requests of each task with both answers, for the picture."""
    found = []
    for task in TASKS:
        request = bench.requests[task]
        said = [" ".join(two) for two in request.captions or zip(request.texts, strict=True)]
        fit = [n for n, words in enumerate(said) if not any(w in words for w in UNFIT)]
        some = _only(request, fit[:: len(fit) // SHOWN[task]][: SHOWN[task]])
        given = some.images[some.before] if some.before else None
        answers = []
        for model, scales in ((bench.naive(task), NAIVE), (ours, OURS)):
            replace_denoiser(bench.pipeline, model)
            generator = torch.Generator().manual_seed(0)
            asked = (bench.pipeline, task, some.texts, given, STEPS)
            answers.append(
                sample(*asked, size=(SIZE, SIZE), generator=generator, **scales.get(task, {}))
            )
        for n, text in enumerate(some.texts):
            before = None if given is None else given[n].float() / 255
            truth = some.images[some.after[n]].float() / 255
            found.append(Line(task, text, before, answers[0][n], answers[1][n], truth))
    return found


def _only(request: Examples, rows: list[int]) -> Examples:
    """Some of the examples of a task."""
    return replace(
        request,
        before=[request.before[row] for row in rows] if request.before else [],
        after=[request.after[row] for row in rows],
        texts=[request.texts[row] for row in rows],
        captions=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="house:tasks", help="the model of all tasks")
    parser.add_argument("--steps", type=int, help="of each fine-tune; the recipe's")
    parser.add_argument("--pictures", type=int, default=96, help="held-out requests of each task")
    parser.add_argument("--seeds", type=int, default=2, help="of sampling")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--only", nargs="*", choices=TASKS, help="train the rivals for these; stop")
    parser.add_argument("--picture", action="store_true", help="draw again what is measured; stop")
    options = parser.parse_args()
    bench = Bench(options)
    if options.only is not None:
        for task in options.only:
            bench.naive(task)
        return
    ours = denoiser(load(folder_of(options.model), device=DEVICE))
    name = f"answers to held-out requests, {bench.settings.steps} steps of {bench.rows} examples"
    if options.picture and (file := results.read("all-in-one")):
        PICTURE.write_text(drawn(lines(bench, ours), file.tables[name]))
        return
    rows = rows_of(bench, ours)
    tables = {
        name: rows,
        "what is kept": kept(bench, ours),
        "conditions": record.conditions({}, DEVICE),
    }
    record.write("all-in-one", (), tables)
    PICTURE.write_text(drawn(lines(bench, ours), rows))


if __name__ == "__main__":
    main()
