"""Ways to tell an enhancer whose voice to keep, compared; and the enhancer in real time.

    python benchmarks/enhancement.py                           # two to three hours on two cores
    python benchmarks/enhancement.py --only cross --seeds 0    # some, for several processes
    python benchmarks/enhancement.py --kept                    # sum up what is trained
    python benchmarks/enhancement.py --parts stream example    # needs an enhancer, see --model

Attention to the whole enrolment, the mean of the encoded enrolment, an embedding of another
encoder, and nothing at all are trained by one recipe from the same seeds on the same mixtures;
attention once more in a model of half the size of the mean's. All are judged on voices that none
has met. Attention is judged once more with the encoded enrolment averaged to one frame after the
training, which tells what its weights make of having more than a mean. The recipe's term that tells
voices apart reaches encoders of enrolments alone, so neither nothing at all nor the embedding,
whose encoder learns to name the same voices before, anew from each seed. Writes
results/streaming-pse.json.

Every arm and seed is trained in a folder of its own under runs/enhancement. A training that was
stopped goes on where it was, and a finished one is never repeated: with other measures, another
recogniser or other sounds it's only judged anew.
"""

import argparse
import fcntl
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import enhancement_example
import enhancement_stream
import record
import seeded
import torch
import voiceprint
from enhancement_marks import MEASURES, Figures, Judge
from torch import Tensor

from pared import recipe
from pared.speech.streaming_pse.layers import Enrolment
from pared.speech.streaming_pse.method import StreamingPSE
from pared.speech.streaming_pse.model import StreamingPSEModel, mean_of
from pared.speech.streaming_pse.training import data_of, taught
from pared.training import checkpoints

SLUG = "streaming-pse"
RECIPE = record.ROOT / "recipes" / SLUG / "voices.toml"
RECOGNISER = "house:conformer"
HALF = "cross, half the size"
AVERAGED = "cross, enrolment averaged"
# What sets an arm apart from the recipe's model.
ARMS: dict[str, dict[str, Any]] = {
    "none": {"conditioning": "none"},
    "static_mean": {"conditioning": "static_mean"},
    "static_vector": {"conditioning": "static_vector", "vector_width": voiceprint.WIDTH},
    "cross": {"conditioning": "cross"},
    HALF: {"conditioning": "cross"},
    AVERAGED: {"conditioning": "cross"},
}
# Arms that are judged with the weights of another.
WEIGHTS = {AVERAGED: "cross"}
# Of the embedding's encoder: the share that it names rightly.
NAMED = "voices of the training, raised and lowered"
# What the claims hang on runs with every seed, the rest with one.
DECISIVE = ("static_mean", "static_vector", "cross", HALF, AVERAGED)
# Whose improvement is claimed to be greater than whose.
DIFFERENCES = {
    "cross-over-static": ("cross", "static_mean"),
    "half-size-over-static": (HALF, "static_mean"),
    "half-size-over-vector": (HALF, "static_vector"),
}

# Figures by arm and seed.
Done = dict[str, dict[int, Figures]]


def half_width(config: dict[str, Any]) -> int:
    """The width at which attention has at most half of the parameters that the mean has."""
    whole = parameters(config | ARMS["static_mean"])
    settings = StreamingPSE(**config)
    step = 2 * settings.heads
    return next(
        width
        for width in range(settings.width, 0, -step)
        if parameters(config | ARMS[HALF] | {"width": width}) <= whole / 2
    )


def parameters(config: dict[str, Any]) -> int:
    """Of a model of these settings."""
    return StreamingPSE(**config).build().num_parameters()


class Bench:
    """The recipe, its arms, and where they are kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.plan = options, options.plan
        self.voiceprints: dict[int, voiceprint.VoicePrint] = {}
        self.judge = Judge(
            self.plan, options.clips, options.pairs, options.recogniser, options.measures
        )

    @cached_property
    def data(self) -> Any:
        """What all learn from."""
        return data_of(self.plan.data)

    def voiceprint(self, seed: int) -> voiceprint.VoicePrint:
        """The other encoder, of the arm static_vector."""
        if seed not in self.voiceprints:
            told = seeded.digest(self.voiceprint_told(seed))
            folder, steps = self.options.folder / f"voiceprint-{told}", self.options.print_steps
            with locked(folder):
                self.voiceprints[seed] = voiceprint.learnt(self.data, folder, steps, seed)
        return self.voiceprints[seed]

    def voiceprint_told(self, seed: int) -> list[Any]:
        """What decides the other encoder."""
        return [self.plan.data.model_dump(mode="json"), self.options.print_steps, seed]

    def planned(self, arm: str, seed: int) -> recipe.Recipe:
        """The recipe of one arm and seed."""
        config = self.plan.model.config | ARMS[arm]
        if arm == HALF:
            config["width"] = half_width(self.plan.model.config)
        return seeded.planned(self.plan, seed, config=config)

    def folder(self, arm: str, seed: int) -> Path:
        """Where an arm is trained: one folder for all that decides its weights, no more."""
        told = seeded.told(self.planned(arm, seed))
        told["voiceprint"] = self.voiceprint_told(seed) if arm == "static_vector" else None
        name = WEIGHTS.get(arm, arm).replace(", ", "-").replace(" ", "-")
        return self.options.folder / f"{name}-{seed}-{seeded.digest(told)}"

    def finished(self, arm: str, seed: int) -> bool:
        """Whether an arm is trained."""
        last = self.folder(arm, seed) / f"stage-{len(self.plan.stages)}"
        if (newest := checkpoints.latest(last)) is None:
            return False
        state = json.loads((newest / "state.json").read_text())
        return bool(state["step"] == self.plan.stages[-1].training.steps)

    def trained(self, arm: str, seed: int) -> StreamingPSEModel:
        """An arm after its training, on the CPU."""
        plan, folder = self.planned(arm, seed), self.folder(arm, seed)
        model, data = recipe.build(plan.model), self.data
        if arm == "static_vector":
            data = voiceprint.Embedded(data, self.voiceprint(seed))
        with locked(folder):
            if not taught(model, data, plan, folder):
                raise SystemExit(130)
            if not (machine := folder / "machine.txt").exists():
                machine.write_text(record.describe_machine(training_device()))
        return model.cpu().eval()

    def told(self, arm: str, seed: int, model: StreamingPSEModel, enrolment: Tensor) -> Enrolment:
        """What the noisy side is told of an enrolment (samples,)."""
        if arm == "static_vector":
            return model.encode(self.voiceprint(seed)(enrolment[None]))
        if arm == AVERAGED:
            return model.cached(mean_of(*model.encoded(enrolment[None]))[:, None])
        return model.encode(enrolment[None])

    def done(self, arm: str, seed: int) -> Figures:
        """The figures of an arm; kept once they are there."""
        folder = self.folder(arm, seed)
        kind = "marks-averaged" if arm == AVERAGED else "marks"
        path = folder / f"{kind}-{self.judge.digest}.json"
        if path.exists():
            return json.loads(path.read_text())
        model = self.trained(arm, seed)

        @torch.no_grad()
        def enhance(noisy: Tensor, enrolment: Tensor) -> Tensor:
            return model.enhance(noisy[None], self.told(arm, seed, model, enrolment))[0]

        figures = {"parameters": model.num_parameters()} | self.judge.marks(enhance)
        if arm == "static_vector":
            figures[NAMED] = voiceprint.named(self.voiceprint(seed), self.data)
        figures["machine"] = (folder / "machine.txt").read_text()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(figures))
        partial.replace(path)
        return figures


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the context other processes that want the same folder wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def training_device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def row_of(arm: str, runs: Sequence[Figures]) -> Figures:
    """One row: means over seeds, and the spread of what the claims are about.

    Raises:
        ValueError: the runs were judged by different measures.
    """
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError(f"{arm}: {[sorted(run) for run in runs]} can't be one row")
    row: Figures = {"enrolment": arm, "seeds": len(runs)}
    for key in runs[0]:
        values = [run[key] for run in runs]
        if key == "machine":
            row[key] = "; ".join(sorted(set(values)))
            continue
        same = len(set(values)) == 1
        row[key] = values[0] if same else float(f"{statistics.mean(values):.4g}")
        if key == "SI-SDRi, dB" and not same:
            row[f"{key} sd"] = float(f"{statistics.stdev(values):.2g}")
    return row


def claims_of(done: Done, budget: str) -> list[Any]:
    """What the method's record claims: differences paired by seed, and flips."""
    where = f"{budget}; held-out voices of the speech world"
    found = []
    for key, arms in DIFFERENCES.items():
        ours, theirs = (done.get(arm, {}) for arm in arms)
        if not (seeds := sorted(ours.keys() & theirs.keys())):
            continue
        gaps = [ours[s]["SI-SDRi, dB"] - theirs[s]["SI-SDRi, dB"] for s in seeds]
        sizes = " and ".join(
            f"{runs[seeds[0]]['parameters'] / 1e6:.2f} M" for runs in (ours, theirs)
        )
        note = f"{sizes} parameters; {where}"
        if arms == ("cross", "static_mean") and (averaged := done.get(AVERAGED)):
            lost = [ours[s]["SI-SDRi, dB"] - averaged[s]["SI-SDRi, dB"] for s in seeds]
            note += f"; with its enrolment averaged, attention gives {statistics.mean(lost):.2f} dB"
            note += " less, so its weights use more than a mean"
        if "static_vector" in arms:
            named = statistics.mean(theirs[seed][NAMED] for seed in seeds)
            note += (
                "; the encoder of the embedding isn't counted; it learns by a task of its own, and "
                f"names {100 * named:.0f} percent of the {NAMED} rightly"
            )
        found.append(seeded.claim(SLUG, key, gaps, seeds, note, ours[seeds[0]]["machine"]))
    if cross := done.get("cross"):
        seeds = sorted(cross)
        shares = [cross[seed]["flips"] for seed in seeds]
        found.append(seeded.claim(SLUG, "flips", shares, seeds, where, cross[seeds[0]]["machine"]))
    return found


def learn(options: argparse.Namespace) -> None:
    """Train the arms, judge them, and write what came out."""
    bench, done = Bench(options), {arm: {} for arm in ARMS}
    for seed, arm in seeded.pairs(options.seeds, options.only or ARMS, DECISIVE):
        if options.kept and not bench.finished(arm, seed):
            continue
        done[arm][seed] = bench.done(arm, seed)
        print(arm, seed, done[arm][seed], flush=True)
    if options.only:
        return
    training = bench.plan.stages[-1].training
    budget = f"{training.steps} steps of {training.batch_size} mixtures of "
    budget += f"{bench.plan.data.seconds:g} s"
    rows = [row_of(name, [marks]) for name, marks in bench.judge.bounds().items()]
    rows += [row_of(arm, list(runs.values())) for arm, runs in done.items() if runs]
    record.write(SLUG, claims_of(done, budget), {f"held-out voices after {budget}": rows})


PARTS = {
    "learn": learn,
    "stream": enhancement_stream.measure,
    "example": enhancement_example.write,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="learn and stream; with --only learn"
    )
    parser.add_argument("--only", nargs="+", choices=ARMS, help="train these and write nothing")
    parser.add_argument("--kept", action="store_true", help="train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/enhancement"), help="of the runs")
    parser.add_argument("--print-steps", type=int, default=800, help="of the other encoder")
    parser.add_argument("--clips", type=int, default=240, help="that are judged")
    parser.add_argument("--pairs", type=int, default=120, help="of talkers that are judged")
    parser.add_argument("--recogniser", default=RECOGNISER)
    parser.add_argument(
        "--measures", nargs="*", choices=MEASURES, help="beside SI-SDR; by default all"
    )
    parser.add_argument("--model", help="enhancer of stream and example; house:streaming-pse")
    parser.add_argument("--minutes", type=float, default=10.0, help="of a timed stream")
    parser.add_argument(
        "--hold", type=float, default=60.0, help="minutes over which memory is read"
    )
    parser.add_argument("--example", type=int, default=0, help="number of the pair that is shown")
    options = parser.parse_args()
    options.plan = recipe.read(options.recipe, options.set)
    for part in options.parts or (["learn"] if options.only else ["learn", "stream"]):
        PARTS[part](options)


if __name__ == "__main__":
    main()
