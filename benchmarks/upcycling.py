"""One model for four tasks against its rivals, after equal steps from the same house U-Net.

    python benchmarks/upcycling.py                      # all arms, best on a GPU
    python benchmarks/upcycling.py --only mtu-4 lora    # some, for several processes
    python benchmarks/upcycling.py --kept               # sum up what is done

Writes claims, tables and figures into results/multi-task-upcycling.json. What is done is kept under
runs/upcycling.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import record
import speed
import torch
from marks import marks_of
from painting import repainted
from torch.nn import Module

import pared
from pared import anatomy
from pared.bench.judge import judge_of
from pared.bench.movement import movement
from pared.checkpoint import load
from pared.healing import student_of, task_of
from pared.method import denoiser, replace_denoiser, stack_of
from pared.tasks.data import TaskData
from pared.training import TrainingSettings, train
from pared.worlds.emoji.edits import MAKERS
from pared.worlds.house import folder_of

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
SLUG, TEACHER, SIZE = "multi-task-upcycling", "house:unet", 64
TASKS = tuple(MAKERS)
# What trains beside every adapter: an input layer for each task.
INPUT = "conv_in.*"
# Noises and times per held-out example.
DRAWS = 4

Figures = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to learn tasks.

    Attributes:
        methods: specs of the conversions.
        tasks: learnt together.
        beside: patterns of what trains beside what the last method names.
        rate: of learning, over that of the other arms.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...] = TASKS
    beside: tuple[str, ...] = ()
    rate: float = 1.0


def _upcycled(experts: int, tasks: Sequence[str] = TASKS) -> Arm:
    # Text-to-image always comes first: it is what calls without a task get.
    known = tuple(dict.fromkeys(("text-to-image", *tasks)))
    spec = f"{SLUG}:experts={experts},tasks={json.dumps(known)}"
    return Arm((spec,), tuple(tasks))


def _adapted(spec: str, rate: float = 1.0) -> Arm:
    return Arm(("picture-input", spec), beside=(INPUT,), rate=rate)


def _alone(task: str) -> Arm:
    known = json.dumps(tuple(dict.fromkeys(("text-to-image", task))))
    return Arm((f"picture-input:tasks={known}",), (task,))


ARMS = {
    "mtu-4": _upcycled(4),
    "lora": _adapted('lora:r=4,places=["fc1","fc2"]'),
    "ia3": _adapted('ia3:places=["fc2"]'),
    # What trains few weights may do best at ten times the rate; DiffFit's paper takes that.
    "mtu-4-fast": replace(_upcycled(4), rate=10),
    "lora-fast": _adapted('lora:r=4,places=["fc1","fc2"]', rate=10),
    "ia3-fast": _adapted('ia3:places=["fc2"]', rate=10),
    "bitfit": _adapted("difffit:locations=[]", rate=10),
    "difffit": _adapted("difffit", rate=10),
    **{f"alone-{task}": _alone(task) for task in TASKS},
    **{f"mtu-{n}": _upcycled(n) for n in (1, 2, 8)},
    **{f"pair-{a}-{b}": _upcycled(4, (a, b)) for a, b in combinations(TASKS, 2)},
    **{f"only-{task}": _upcycled(4, (task,)) for task in TASKS},
}
# What the verdicts hang on runs with every seed, the rest with one.
RIVALS = ("mtu-4", "lora", "ia3")
DECISIVE = (*RIVALS, *(f"{n}-fast" for n in RIVALS), *(f"alone-{task}" for task in TASKS))


class Bench:
    """The teacher, the examples of every task, and what everything is measured on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path("runs/upcycling") / f"{options.steps}x{options.rows}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pipeline = load(folder_of(TEACHER), device=DEVICE)
        self.pipeline.set_progress_bar_config(disable=True)
        self.teacher, self.objective = denoiser(self.pipeline), task_of(self.pipeline)
        self.judge = judge_of("house:judge")
        examples = [make(SIZE, "train", options.examples) for make in MAKERS.values()]
        self.all = TaskData(self.pipeline, examples, tasks=TASKS)
        self.held_out = {
            task: make(size=SIZE, split="heldout", count=options.pictures)
            for task, make in MAKERS.items()
        }

    def trained(self, arm: Arm, seed: int, folder: Path) -> tuple[Module, Module]:
        """The teacher converted, as it is then and after training on the arm's tasks."""
        torch.manual_seed(seed)
        methods = [pared.parse(spec) for spec in arm.methods]
        before = pared.convert(student_of(self.teacher), *methods)
        student, family = copy.deepcopy(before), anatomy.of(before)
        known = next(m.tasks for m in methods if hasattr(m, "tasks"))
        patterns = (*arm.beside, *methods[-1].trainable(family))
        settings = TrainingSettings(
            steps=self.options.steps,
            batch_size=self.options.rows * len(arm.tasks),
            learning_rate=arm.rate * self.options.learning_rate,
            warmup=10,
            schedule="cosine",
            precision="bf16",
            trainable=patterns,
            seed=seed,
        )
        data = self.all.only(arm.tasks, known)
        run = train(student, self.objective, data, settings, folder)
        if not run.finished:
            raise SystemExit(130)
        return before.eval(), student.eval()

    def done(self, name: str, seed: int) -> Figures:
        """The figures of an arm; kept once they are there."""
        path = self.folder / f"{name}-{seed}.json"
        if path.exists():
            return json.loads(path.read_text())
        arm = ARMS[name]
        before, student = self.trained(arm, seed, path.with_suffix(""))
        figures: Figures = {
            "trained": sum(p.numel() for p in student.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in student.parameters()),
            "machine": record.describe_machine(DEVICE),
        }
        for task in arm.tasks:
            figures |= {f"loss, {task}": self.loss(student, task)}
            figures |= {f"{mark}, {task}": x for mark, x in self.marks(student, task).items()}
        if name.startswith("alone-"):
            figures["movement"] = [asdict(m) for m in movement(before, student)]
        path.write_text(json.dumps(figures))
        return figures

    @torch.no_grad()
    def loss(self, model: Module, task: str) -> float:
        """The task's loss on held-out examples, with noise and times that are always the same."""
        known = next((m.tasks for m in stack_of(model) if hasattr(m, "tasks")), (task,))
        data = TaskData(self.pipeline, [self.held_out[task]], drop=False, tasks=known)
        generator, total = torch.Generator().manual_seed(0), 0.0
        rows = torch.arange(len(self.held_out[task]))
        for _ in range(DRAWS):
            for some in rows.split(32):
                batch = {k: v.to(DEVICE) for k, v in data.batch(some, generator).items()}
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    loss = self.objective(model, batch, generator)["task"]
                total += float(loss) * len(some) / len(rows) / DRAWS
        return total

    def marks(self, model: Module, task: str) -> Figures:
        """How good its pictures are on held-out examples."""
        return marks_of(self.judge, self.held_out[task], self.painted(model, task))

    def painted(self, model: Module, task: str) -> torch.Tensor:
        """One picture for each held-out example, each batch from a noise of its own."""
        replace_denoiser(self.pipeline, model)
        found = repainted(self.pipeline, task, self.held_out[task], self.options.sampling_steps)
        replace_denoiser(self.pipeline, self.teacher)
        return found


def mean_loss(figures: Figures) -> float:
    """Over all tasks."""
    return statistics.mean(figures[f"loss, {task}"] for task in TASKS)


def row_of(name: str, runs: list[Figures]) -> Figures:
    """One row: means over seeds, with the spread of the mean loss."""
    keys = [k for k in runs[0] if k not in ("movement", "machine")]
    row: Figures = {"model": name, "seeds": len(runs)}
    row |= {k: float(f"{statistics.mean(run[k] for run in runs):.4g}") for k in keys}
    if all(f"loss, {task}" in runs[0] for task in TASKS):
        losses = [mean_loss(run) for run in runs]
        row["mean loss"] = float(f"{statistics.mean(losses):.4g}")
        if len(losses) > 1:
            row["mean loss sd"] = float(f"{statistics.stdev(losses):.2g}")
    return row | {"machine": "; ".join(sorted({str(run["machine"]) for run in runs}))}


def at_best(done: dict[str, list[Figures]], name: str) -> list[Figures]:
    """The runs of an arm at the better one of its learning rates."""
    runs = [done[n] for n in (name, f"{name}-fast") if n in done]
    return min(runs, key=lambda some: mean_loss(some[0]), default=[])


def ratios(over: list[float], under: list[float]) -> tuple[float, float | None]:
    """Mean and spread of ratios by seed."""
    found = [a / b for a, b in zip(over, under, strict=False)]
    return statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None


def claims_of(done: dict[str, list[Figures]], base: Figures, budget: str) -> list:
    """What the arms that are done decide."""
    ours, claims = at_best(done, "mtu-4"), []

    def add(key: str, over: list[float], under: list[float], note: str) -> None:
        if over and under:
            value, spread = ratios(over, under)
            seeds = range(min(len(over), len(under)))
            said = f"{note}; house:unet, {budget}, held-out examples"
            claims.append(record.claim(SLUG, key, value, spread, seeds, said, ours[0]["machine"]))

    losses = [mean_loss(run) for run in ours]
    for rival in ("lora", "ia3"):
        add(
            f"loss-{rival}-over-all",
            [mean_loss(run) for run in at_best(done, rival)],
            losses,
            "mean loss of four tasks, each at the better of two rates",
        )
    alone = {task: done.get(f"alone-{task}", []) for task in TASKS}
    if all(alone.values()):
        sets = zip(*alone.values(), strict=False)
        single = [
            statistics.mean(run[f"loss, {t}"] for t, run in zip(TASKS, each, strict=True))
            for each in sets
        ]
        add("loss-all-over-single", losses, single, "mean loss of four tasks")
    paint = [run["loss, text-to-image"] for run in ours]
    add("painting-loss-over-base", paint, [base["loss, text-to-image"]] * len(paint), "loss")
    for key, mark, task in (
        ("edit-over-single", "DCS", "edit"),
        ("upscale-single-over-all", "judge's distance to truth", "upscale"),
    ):
        mine = [run[f"{mark}, {task}"] for run in ours]
        theirs = [run[f"{mark}, {task}"] for run in alone[task]]
        over, under = (mine, theirs) if key == "edit-over-single" else (theirs, mine)
        add(key, over, under, mark)
    paint = [run["Frechet to real, text-to-image"] for run in ours]
    whole = [base["Frechet to real, text-to-image"]] * len(paint)
    add("painting-base-over-all", whole, paint, "Frechet distance of the judge's features")
    return claims


def moved(done: dict[str, list[Figures]]) -> list[Figures]:
    """How far each kind of layer moved in the single fine-tunes, means over layers and tasks."""
    layers: dict[str, list[float]] = {}
    for name, runs in done.items():
        for each in runs[0].get("movement", []) if name.startswith("alone-") else []:
            layers.setdefault(each["kind"], []).append(each["relative"])
    return [
        {
            "layers": kind,
            "count": len(x) // 4,
            "relative movement": float(f"{statistics.mean(x):.3g}"),
        }
        for kind, x in sorted(layers.items(), key=lambda item: -statistics.mean(item[1]))
    ]


# Arms that train a few weights of one model, as the field writes their names.
FEW = {"lora": "LoRA", "ia3": "IA3", "bitfit": "BitFit", "difffit": "DiffFit"}


def figures_of(rows: list[Figures], layers: list[Figures]) -> Figures:
    """What is drawn, from the rows of the table of tasks and from `moved`."""
    upcycled, few, alone = [], [], {}
    for row in rows:
        kind, _, rest = row["model"].partition("-")
        rest = rest.replace("-fast", ", 10 times the rate")
        if kind == "mtu":
            upcycled.append((rest, row["parameters"], row["mean loss"]))
        elif kind == "alone":
            alone[rest] = (row["parameters"], row[f"loss, {rest}"])
        elif kind in FEW:
            label = f"{FEW[kind]}, 10 times the rate" if rest == "fast" else FEW[kind]
            few.append((label, row["parameters"], row["mean loss"]))
    groups = {"upcycled, by number of experts": upcycled, "few weights trained": few}
    if set(alone) == set(TASKS):
        kept, losses = zip(*alone.values(), strict=True)
        groups["four fine-tunes"] = [("one for each task", sum(kept), statistics.mean(losses))]
    points = {
        group: [(label, round(kept / 1e6, 3), float(f"{loss:.4g}")) for label, kept, loss in some]
        for group, some in groups.items()
        if some
    }
    x, y = "million parameters kept for four tasks", "mean loss of four tasks"
    figures = {"loss against parameters kept": record.points(x, y, points, log=True)}
    if layers:
        figures["how far layers move when fine-tuned for one task"] = record.bars(
            "norm of the change over that of the parameters",
            {row["layers"].replace("_", " "): row["relative movement"] for row in layers},
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=8, help="of each task in a batch")
    parser.add_argument("--examples", type=int, default=2000, help="of each task to learn from")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=96, help="held-out examples of each task")
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
            print(
                name, seed, {k: v for k, v in done[name][-1].items() if k != "movement"}, flush=True
            )
    if options.only:
        return
    base: Figures = {"machine": record.describe_machine(DEVICE)}
    base["parameters"] = sum(p.numel() for p in bench.teacher.parameters())
    base["loss, text-to-image"] = bench.loss(bench.teacher, "text-to-image")
    found = bench.marks(bench.teacher, "text-to-image")
    base |= {f"{mark}, text-to-image": x for mark, x in found.items()}
    budget = f"{options.steps} steps of {options.rows} examples of each task"
    rows = [row_of("base", [base]), *(row_of(name, runs) for name, runs in done.items())]
    tables = {f"four tasks, {budget}": rows}
    if layers := moved(done):
        tables["how far layers move when fine-tuned for one task"] = layers
    upcycled, plain = (speed.macs("sd1.5", m, 512) for m in ([pared.MultiTaskUpcycling()], []))
    counted = record.claim(SLUG, "macs-over-base", upcycled / plain, None, (0,), "counted")
    claims = [counted, *claims_of(done, base, budget)]
    record.write(SLUG, claims, tables, figures_of(rows, layers))


if __name__ == "__main__":
    main()
