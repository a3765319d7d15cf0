"""Heals EDiT, its baselines and its ablation from the house teacher, all alike, and compares.

    python benchmarks/edit_quality.py                       # three seeds, an hour; resumes
    python benchmarks/edit_quality.py --steps 100 --seeds 1 # a first look

Writes the claims and the comparison table into results/edit.json. Every (method, seed) that is done
leaves a file under runs/edit-quality, so the script may be stopped and started at will.
"""

import argparse
import json
import statistics
from pathlib import Path

import record
import torch

import pared
from pared import anatomy
from pared.bench.alignment import retrieval
from pared.bench.distances import frechet, median_bandwidth, mmd
from pared.bench.judge import judge_of
from pared.checkpoint import load
from pared.healing import heal, student_of, task_of
from pared.method import denoiser, replace_denoiser
from pared.worlds import emoji
from pared.worlds.datasets import latents_of
from pared.worlds.house import folder_of

ARMS = {
    "EDiT (CF,SC,SC)": "edit",
    "EDiT without CF (none,SC,SC)": "edit:query=none",
    "SANA style": "sana",
    "LinFusion": "linfusion",
    "KV compression": "kv-compression",
}
CLAIMS = {
    "distance-sana-over-edit": "SANA style",
    "distance-linfusion-over-edit": "LinFusion",
    "distance-kv-over-edit": "KV compression",
    "distance-nocf-over-edit": "EDiT without CF (none,SC,SC)",
}
FOLDER = Path("runs/edit-quality")


class Bench:
    """The teacher, its data, and the fixed noise on which everything is measured."""

    def __init__(self, pictures: int, sampling_steps: int) -> None:
        self.pipeline = load(folder_of("house:pixart"))
        self.pipeline.set_progress_bar_config(disable=True)
        self.teacher = denoiser(self.pipeline)
        self.judge = judge_of("house:judge")
        self.sampling_steps = sampling_steps
        self.data = self._data("train")
        self.held_out = self._data("heldout")
        self.captions = emoji.load(size=None).captions
        train = emoji.load(split="train", size=None).captions
        self.prompts = train[:: max(1, len(train) // pictures)][:pictures]
        self.teacher_features = self.features(self.teacher)

    def _data(self, split: str):
        world = emoji.load(split=split, size=64)
        return latents_of(self.pipeline, world.images, world.captions)

    @torch.no_grad()
    def output_error(self, model: torch.nn.Module) -> float:
        """Relative squared distance to the teacher's prediction, on held-out pictures."""
        task = task_of(self.pipeline)
        generator = torch.Generator().manual_seed(12345)
        batch = self.held_out.batch(torch.arange(len(self.held_out)), generator)
        noised = task.noised(batch, generator)
        condition = {"text": batch["text"], "mask": batch["mask"]}
        outputs = [
            anatomy.of(m).denoise(m, noised.latents, noised.timestep, condition)
            for m in (model, self.teacher)
        ]
        return float((outputs[0] - outputs[1]).square().sum() / outputs[1].square().sum())

    def features(self, model: torch.nn.Module) -> torch.Tensor:
        """The judge's view of one picture per prompt, on noise that is the same for every model."""
        replace_denoiser(self.pipeline, model.eval())
        found = []
        for start in range(0, len(self.prompts), 32):
            prompts = self.prompts[start : start + 32]
            generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
            with torch.autocast("cpu", torch.bfloat16):
                images = self.pipeline(
                    prompts,
                    num_inference_steps=self.sampling_steps,
                    guidance_scale=1.0,  # the model's own distribution, and half the time
                    generator=generators,
                    use_resolution_binning=False,
                    max_sequence_length=32,
                    output_type="pt",
                ).images
            found.append(self.judge.of_images(images.float()))
        replace_denoiser(self.pipeline, self.teacher)
        return torch.cat(found)

    def measure(self, model: torch.nn.Module) -> dict[str, float]:
        """All figures of one model."""
        features = self.features(model) if model is not self.teacher else self.teacher_features
        texts = self.judge.of_texts(self.captions)
        target = torch.tensor([self.captions.index(p) for p in self.prompts])
        top = retrieval(features, texts, target)
        bandwidth = median_bandwidth(self.teacher_features)
        return {
            "output error": self.output_error(model),
            "Frechet to teacher": frechet(features, self.teacher_features),
            "MMD to teacher x1000": 1000
            * mmd(features, self.teacher_features, bandwidth=bandwidth),
            "top-1": top[1],
            "top-5": top[5],
            "parameters": sum(p.numel() for p in model.parameters()),
        }


def healed(bench: Bench, spec: str, seed: int, options: argparse.Namespace) -> torch.nn.Module:
    """A conversion of the teacher, healed with the budget that all share."""
    torch.manual_seed(seed)
    student = pared.convert(student_of(bench.teacher), pared.parse(spec))
    folder = FOLDER / f"{spec.replace(':', '-')}-{seed}"
    run = heal(
        student,
        bench.teacher,
        bench.data,
        folder,
        task=task_of(bench.pipeline),
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup=10,
        seed=seed,
        precision="bf16",
    )
    if not run.finished:
        raise SystemExit(130)
    return student


def table_of(done: dict[str, list[dict[str, float]]]) -> list[dict]:
    """Mean and standard deviation over seeds, a row per arm."""
    rows = []
    for arm, runs in done.items():
        row: dict[str, object] = {"model": arm, "seeds": len(runs)}
        for key in runs[0]:
            values = [run[key] for run in runs]
            row[key] = round(statistics.mean(values), 5)
            if len(values) > 1 and key != "parameters":
                row[f"{key} sd"] = round(statistics.stdev(values), 5)
        rows.append(row)
    return rows


def claims_of(done: dict[str, list[dict[str, float]]], note: str) -> list:
    """How much farther from the teacher each rival ends than EDiT, paired by seed."""
    edit = done["EDiT (CF,SC,SC)"]
    found = []
    for key, arm in CLAIMS.items():
        ratios = [
            rival["output error"] / ours["output error"]
            for rival, ours in zip(done[arm], edit, strict=True)
        ]
        spread = statistics.stdev(ratios) if len(ratios) > 1 else None
        mean = statistics.mean(ratios)
        found.append(record.claim("edit", key, mean, spread, tuple(range(len(ratios))), note))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--sampling-steps", type=int, default=8)
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.pictures, options.sampling_steps)
    done = {"teacher": [bench.measure(bench.teacher)]}
    for seed in range(options.seeds):
        for arm, spec in ARMS.items():
            path = FOLDER / f"{spec.replace(':', '-')}-{seed}.json"
            if not path.exists():
                model = healed(bench, spec, seed, options)
                path.write_text(json.dumps(bench.measure(model)))
            done.setdefault(arm, []).append(json.loads(path.read_text()))
            print(arm, seed, done[arm][-1], flush=True)
    note = (
        f"relative output error on held-out pictures after {options.steps} healing steps of "
        f"{options.batch_size} from the house teacher, every method alike; ratio of means by seed"
    )
    print(record.write("edit", claims_of(done, note), {"healed alike": table_of(done)}))


if __name__ == "__main__":
    main()
