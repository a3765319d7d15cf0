"""Ways to tell an enhancer whose voice to keep, compared; and the enhancer in real time.

    python benchmarks/enhancement.py                           # two hours on two cores
    python benchmarks/enhancement.py --only cross --seeds 0    # some, for several processes
    python benchmarks/enhancement.py --kept                    # sum up what is done
    python benchmarks/enhancement.py --parts stream example    # needs an enhancer, see --model

Attention to the whole enrolment, the mean of the encoded enrolment, an embedding of another
encoder, and nothing at all are trained by one recipe from the same seeds on the same mixtures;
attention once more in a model of half the size of the mean's. All are judged on voices that none
has met. A run that was stopped goes on where it was. Writes results/streaming-pse.json; what is
done is kept under runs/enhancement.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import statistics
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import enhancement_example
import enhancement_stream
import record
import torch
import voiceprint
from enhancement_sets import clips, kept, pairs
from torch import Tensor

from pared import recipe
from pared.bench import sound
from pared.bench.words import word_errors
from pared.speech.recognition import load, transcribe
from pared.speech.streaming_pse.method import StreamingPSE
from pared.speech.streaming_pse.model import StreamingPSEModel
from pared.speech.streaming_pse.training import data_of, taught
from pared.worlds import house
from pared.worlds.house import folder_of

SLUG = "streaming-pse"
RECIPE = record.ROOT / "recipes" / SLUG / "voices.toml"
RECOGNISER = "house:conformer"
HALF = "cross, half the size"
# What sets an arm apart from the recipe's model.
ARMS: dict[str, dict[str, Any]] = {
    "none": {"conditioning": "none"},
    "static_mean": {"conditioning": "static_mean"},
    "static_vector": {"conditioning": "static_vector", "vector_width": voiceprint.WIDTH},
    "cross": {"conditioning": "cross"},
    HALF: {"conditioning": "cross"},
}
# What the claims hang on runs with every seed, the rest with one.
DECISIVE = ("static_mean", "cross", HALF)

Figures = dict[str, Any]
# (recording, enrolment) -> what is kept of it.
Enhancer = Callable[[Tensor, Tensor], Tensor]


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
    """The recipe, the held-out sets, and what everyone is judged by."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.plan = options, options.plan
        told = json.dumps([self.plan.model_dump(mode="json"), options.clips, options.pairs])
        digest = hashlib.sha256(told.encode()).hexdigest()[:8]
        self.folder = options.folder / f"{self.plan.name}-{digest}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clips, self.pairs = clips(self.plan, options.clips), pairs(self.plan, options.pairs)
        self.recogniser = recogniser(options.recogniser)

    @cached_property
    def data(self) -> Any:
        """What all learn from."""
        return data_of(self.plan.data)

    @cached_property
    def voiceprint(self) -> voiceprint.VoicePrint:
        """The other encoder, of the arm static_vector."""
        return voiceprint.learnt(self.data, self.folder / "voiceprint", self.options.print_steps)

    def planned(self, arm: str, seed: int) -> recipe.Recipe:
        """The recipe of one arm and seed."""
        config = self.plan.model.config | ARMS[arm]
        if arm == HALF:
            config["width"] = half_width(self.plan.model.config)
        model = self.plan.model.model_copy(update={"config": config, "seed": seed})
        stages = tuple(
            stage.model_copy(update={"training": stage.training.model_copy(update={"seed": seed})})
            for stage in self.plan.stages
        )
        return self.plan.model_copy(update={"model": model, "stages": stages})

    def trained(self, arm: str, seed: int, folder: Path) -> StreamingPSEModel:
        """An arm after its training, on the CPU."""
        plan = self.planned(arm, seed)
        model, data = recipe.build(plan.model), self.data
        if arm == "static_vector":
            data = voiceprint.Embedded(data, self.voiceprint)
        if not taught(model, data, plan, folder):
            raise SystemExit(130)
        return model.cpu().eval()

    def done(self, arm: str, seed: int) -> Figures:
        """The figures of an arm; kept once they are there."""
        path = self.path(arm, seed)
        if path.exists():
            return json.loads(path.read_text())
        model = self.trained(arm, seed, path.with_suffix(""))

        def enhance(noisy: Tensor, enrolment: Tensor) -> Tensor:
            if arm == "static_vector":
                enrolment = self.voiceprint(enrolment[None])[0]
            return kept(model, noisy, enrolment)

        figures = {"parameters": model.num_parameters()} | self.marks(enhance)
        figures["machine"] = record.describe_machine(training_device())
        path.write_text(json.dumps(figures))
        return figures

    def path(self, arm: str, seed: int) -> Path:
        """Where the figures of an arm are kept."""
        return self.folder / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}.json"

    def marks(self, enhance: Enhancer) -> Figures:
        """How good what is kept is, on all held-out sets."""
        enhanced = [enhance(one.mixture, one.enrolment) for one in self.clips]
        return self.of_clips(enhanced) | self.of_pairs(enhance)

    def of_clips(self, enhanced: list[Tensor]) -> Figures:
        """Marks on mixtures of all kinds, each kind of mark where it makes sense."""
        both = list(zip(self.clips, enhanced, strict=True))
        present = [(one, ours) for one, ours in both if one.present]
        mixed = [(one, ours) for one, ours in present if min(one.sir, one.snr) < math.inf]
        absent = [(one, ours) for one, ours in both if not one.present]
        ours = torch.stack([ours for _, ours in mixed])
        target = torch.stack([one.target for one, _ in mixed])
        noisy = torch.stack([one.mixture for one, _ in mixed])
        quality = sound.pesq(ours, target)
        found: Figures = {
            "SI-SDRi, dB": float(sound.improvement(ours, target, noisy).mean()),
            "PESQ": float(quality.nanmean()),
            "without PESQ": int(quality.isnan().sum()),
            "ESTOI": float(sound.estoi(ours, target).nanmean()),
        }
        if dnsmos_installed():
            found |= {f"DNSMOS, {k}": float(v.mean()) for k, v in sound.dnsmos(ours).items()}
        wanted = torch.stack([one.target for one, _ in present])
        given = torch.stack([ours for _, ours in present])
        found["frames suppressed"] = float(sound.oversuppression(given, wanted).nanmean())
        if absent:
            left = [sound.remainder(o[None], one.mixture[None]) for one, o in absent]
            found["left without target, dB"] = float(torch.cat(left).mean())
        return found

    def of_pairs(self, enhance: Enhancer) -> Figures:
        """Marks on two talkers, with either enrolment; and what a recogniser hears."""
        gains, flipped, heard = [], [], []
        for pair in self.pairs:
            first, second = (enhance(pair.mixture, e)[None] for e in (pair.mine, pair.theirs))
            target, other = pair.target[None], pair.other[None]
            gains.append(sound.improvement(first, target, pair.mixture[None]))
            flipped.append(sound.flips(first, second, target, other))
            heard.append(first[0])
        found = {
            "SI-SDRi of pairs, dB": float(torch.cat(gains).mean()),
            "flips": float(torch.cat(flipped).float().mean()),
        }
        if self.recogniser is not None:
            texts = [" ".join(w.text for w in transcribe(self.recogniser, [x])) for x in heard]
            found["WER of pairs"] = word_errors([pair.said for pair in self.pairs], texts).rate
        return found

    def bounds(self) -> list[Figures]:
        """Rows for comparison: nothing done at all, and the targets themselves."""
        targets = {id(one.mixture): one.target for one in (*self.clips, *self.pairs)}
        best = self.marks(lambda noisy, _: targets[id(noisy)])
        # The others compare with the target, and say nothing of itself.
        best = {name: mark for name, mark in best.items() if name.startswith(("DNSMOS", "WER"))}
        return [
            row_of("unprocessed", [self.marks(lambda noisy, _: noisy)]),
            row_of("the target itself", [best]),
        ]


def training_device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def dnsmos_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("speechmos", "librosa", "requests"))


def recogniser(name: str) -> Any:
    """The one that counts words, the same for all; None where it isn't shipped."""
    if name.startswith("house:") and name.removeprefix("house:") not in house.names():
        print(f"{name} isn't shipped; words aren't counted")
        return None
    return load(folder_of(name))


def row_of(arm: str, runs: list[Figures]) -> Figures:
    """One row: means over seeds, and the spread of what the claims are about."""
    row: Figures = {"enrolment": arm, "seeds": len(runs)}
    for key in runs[0]:
        values = [run[key] for run in runs]
        if key == "machine":
            row[key] = "; ".join(sorted(set(values)))
            continue
        row[key] = float(f"{statistics.mean(values):.4g}")
        if key == "SI-SDRi, dB" and len(values) > 1:
            row["sd"] = float(f"{statistics.stdev(values):.2g}")
    return row


def claims_of(done: dict[str, list[Figures]], budget: str) -> list[Any]:
    """Differences paired by seed."""
    found = []
    for key, arm in (("cross-over-static", "cross"), ("half-size-over-static", HALF)):
        both = list(zip(done.get(arm, []), done.get("static_mean", []), strict=False))
        if not both:
            continue
        gaps = [ours["SI-SDRi, dB"] - theirs["SI-SDRi, dB"] for ours, theirs in both]
        spread = statistics.stdev(gaps) if len(gaps) > 1 else None
        sizes = " and ".join(f"{figures['parameters'] / 1e6:.2f} M" for figures in both[0])
        note = f"{budget}; {sizes} parameters; held-out voices of the speech world"
        made = both[0][0]["machine"]
        mean, seeds = statistics.mean(gaps), range(len(gaps))
        found.append(record.claim(SLUG, key, mean, spread, seeds, note, made))
    return found


def learn(options: argparse.Namespace) -> None:
    """Train the arms, judge them, and write what came out."""
    bench, done = Bench(options), {}
    for seed in options.seeds:
        for arm in ARMS:
            skipped = (options.only and arm not in options.only) or (
                options.kept and not bench.path(arm, seed).exists()
            )
            if skipped or (seed != options.seeds[0] and arm not in DECISIVE):
                continue
            done.setdefault(arm, []).append(bench.done(arm, seed))
            print(arm, seed, done[arm][-1], flush=True)
    if options.only:
        return
    training = bench.plan.stages[-1].training
    budget = f"{training.steps} steps of {training.batch_size} mixtures of "
    budget += f"{bench.plan.data.seconds:g} s"
    rows = [*bench.bounds(), *(row_of(arm, runs) for arm, runs in done.items())]
    title = f"held-out voices after {budget}"
    record.write(SLUG, claims_of(done, budget), {title: rows})


PARTS = {
    "learn": learn,
    "stream": enhancement_stream.measure,
    "example": enhancement_example.write,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["learn", "stream"])
    parser.add_argument("--only", nargs="+", choices=ARMS, help="train these and write nothing")
    parser.add_argument("--kept", action="store_true", help="train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/enhancement"), help="of the runs")
    parser.add_argument("--print-steps", type=int, default=400, help="of the other encoder")
    parser.add_argument("--clips", type=int, default=240, help="that are judged")
    parser.add_argument("--pairs", type=int, default=120, help="of talkers that are judged")
    parser.add_argument("--recogniser", default=RECOGNISER)
    parser.add_argument("--model", help="enhancer of stream and example; house:streaming-pse")
    parser.add_argument("--minutes", type=float, default=10.0, help="of a timed stream")
    parser.add_argument(
        "--hold", type=float, default=60.0, help="minutes over which memory is read"
    )
    parser.add_argument("--example", type=int, default=0, help="number of the pair that is shown")
    options = parser.parse_args()
    options.plan = recipe.read(options.recipe, options.set)
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
