"""What the quality scripts share: students healed alike from one teacher, and how far they end."""

import argparse
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record
import torch
from painting import painted

import pared
from pared import anatomy, results
from pared.bench.alignment import retrieval
from pared.bench.distances import frechet, median_bandwidth, mmd
from pared.bench.judge import judge_of
from pared.checkpoint import load
from pared.healing import heal, student_of, task_of
from pared.layerwise import HeldOut
from pared.method import denoiser, replace_denoiser, stack_of
from pared.training import TrainingSettings, train
from pared.worlds import emoji
from pared.worlds.datasets import latents_of
from pared.worlds.house import folder_of

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")

Figures = dict[str, float | str]


def parser(doc: str) -> argparse.ArgumentParser:
    """The options of a quality script."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--steps", type=int, default=150, help="of healing")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--learning-rate", type=float, default=5e-4)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--pictures", type=int, default=200, help="painted for the distances")
    made.add_argument("--sampling-steps", type=int, default=8)
    made.add_argument(
        "--only", nargs="*", metavar="SPEC", help="heal these and stop: for several processes"
    )
    made.add_argument("--kept", action="store_true", help="heal nothing, show what is done")
    return made


class Bench:
    """A teacher, its data, and the fixed noise on which everything is measured.

    Args:
        teacher: name of the house pipeline.
        options: of `parser`.

    Trainings go to a folder under runs/quality; every (method, seed) that is done leaves a file
    there, so a script may be stopped and started at will, and run in several processes.
    """

    def __init__(self, teacher: str, options: argparse.Namespace) -> None:
        budget = f"{options.steps}x{options.batch_size}"
        self.options = options
        self.folder = Path("runs/quality") / f"{teacher.removeprefix('house:')}-{budget}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pipeline = load(folder_of(teacher), device=DEVICE)
        self.pipeline.set_progress_bar_config(disable=True)
        self.teacher, self.task = denoiser(self.pipeline), task_of(self.pipeline)
        self.judge = judge_of("house:judge")
        self.data, held_out = self._data("train"), self._data("heldout")
        count = len(held_out)
        self.held_out = HeldOut(self.teacher, held_out, self.task, count, count, seed=12345)
        self.captions = emoji.load(size=None).captions
        train = emoji.load(split="train", size=None).captions
        self.prompts = train[:: max(1, len(train) // options.pictures)][: options.pictures]
        self.teacher_features = self.features(self.teacher)

    def _data(self, split: str):
        world = emoji.load(split=split, size=64)
        return latents_of(self.pipeline, world.images, world.captions)

    def features(self, model: torch.nn.Module) -> torch.Tensor:
        """The judge's view of one picture per prompt, on noise that is the same for every model."""
        replace_denoiser(self.pipeline, model.eval())
        # Without guidance: the model's own distribution, and half the time.
        images = painted(self.pipeline, self.prompts, self.options.sampling_steps, guidance=1.0)
        replace_denoiser(self.pipeline, self.teacher)
        return self.judge.of_images(images)

    def measure(self, model: torch.nn.Module) -> Figures:
        """All figures of one model."""
        features = self.features(model) if model is not self.teacher else self.teacher_features
        texts = self.judge.of_texts(self.captions)
        target = torch.tensor([self.captions.index(p) for p in self.prompts])
        top = retrieval(features, texts, target)
        bandwidth = median_bandwidth(self.teacher_features)
        distance = mmd(features, self.teacher_features, bandwidth=bandwidth)
        return {
            "output error": self.held_out.error(model),
            "Frechet to teacher": frechet(features, self.teacher_features),
            "MMD to teacher x1000": 1000 * distance,
            "top-1": top[1],
            "top-5": top[5],
            "parameters": sum(p.numel() for p in model.parameters()),
            "machine": record.describe_machine(DEVICE),
        }

    def path(self, spec: str, seed: int, by_task: bool = False) -> Path:
        """Where the figures of a conversion are kept."""
        how = "-task" if by_task else ""
        return self.folder / f"{re.sub('[:=,]', '-', spec)}{how}-{seed}.json"

    def healed(self, spec: str, seed: int, by_task: bool = False) -> Figures:
        """The figures of a conversion, healed with the budget that all share; kept once done.

        Args:
            spec: of the conversion.
            seed: of its new weights and its training.
            by_task: train it on the pictures alone, without the teacher.
        """
        options, path = self.options, self.path(spec, seed, by_task)
        if path.exists():
            return json.loads(path.read_text())
        torch.manual_seed(seed)
        student = pared.convert(student_of(self.teacher), pared.parse(spec))
        before = self.held_out.error(student.eval())
        budget: dict[str, Any] = {
            "steps": options.steps,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "warmup": 10,
            "seed": seed,
            "precision": "bf16",
        }
        folder = path.with_suffix("")
        if by_task:
            trainable = stack_of(student)[-1].trainable(anatomy.of(student))
            settings = TrainingSettings(trainable=trainable, **budget)
            run = train(student, self.task, self.data, settings, folder)
        else:
            run = heal(student, self.teacher, self.data, folder, task=self.task, **budget)
        if not run.finished:
            raise SystemExit(130)
        figures = {"error before healing": before} | self.measure(student)
        path.write_text(json.dumps(figures))
        return figures

    def all_of(self, arms: Mapping[str, str]) -> dict[str, list[Figures]]:
        """The teacher's figures and those of every arm by seed, by name."""
        only, kept = self.options.only, self.options.kept
        done = {"teacher": [{"error before healing": 0.0} | self.measure(self.teacher)]}
        for seed in range(self.options.seeds):
            for arm, spec in arms.items():
                if only is not None and spec not in only:
                    continue
                if kept and not self.path(spec, seed).exists():
                    continue
                done.setdefault(arm, []).append(self.healed(spec, seed))
                print(arm, seed, done[arm][-1], flush=True)
        if only is not None:
            raise SystemExit(0)
        return done


def table_of(done: dict[str, list[Figures]]) -> list[dict]:
    """Mean and standard deviation over seeds, a row per arm."""
    rows = []
    for arm, runs in done.items():
        row: dict[str, object] = {"model": arm, "seeds": len(runs)}
        for key in runs[0]:
            values = [run[key] for run in runs]
            if key == "machine":
                row[key] = "; ".join(sorted(set(values)))
                continue
            row[key] = round(statistics.mean(values), 5)
            if len(values) > 1 and key not in ("parameters", "error before healing"):
                row[f"{key} sd"] = round(statistics.stdev(values), 5)
        rows.append(row)
    return rows


def claim_of(
    slug: str, key: str, rival: list[Figures], ours: list[Figures], note: str
) -> results.Measured:
    """The claim that a rival ends farther from the teacher, over the seeds that both have."""
    count = min(len(rival), len(ours))
    found = ratios(rival[:count], ours[:count])
    spread = statistics.stdev(found) if count > 1 else None
    # Kept figures may come from another machine than the one that sums them up.
    machine = str(ours[0]["machine"])
    return record.claim(slug, key, statistics.mean(found), spread, range(count), note, machine)


def ratios(rival: list[Figures], ours: list[Figures], key: str = "output error") -> list[float]:
    """How many times farther from the teacher a rival ends, by seed."""
    return [a[key] / b[key] for a, b in zip(rival, ours, strict=True)]
