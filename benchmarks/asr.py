"""Attentions of a Conformer compared as recognisers: errors, cost of training, cost of length.

    python benchmarks/asr.py                     # two hours on two cores
    python benchmarks/asr.py --only relative     # train these, for several processes
    python benchmarks/asr.py --parts lengths

Relative positions as in Transformer-XL are the base; rotary positions and SummaryMixing are the
other arms. All are trained by one recipe, from the same seeds, on the same utterances in the same
order, and are heard by voices that none has met, in noise and without. A run that was stopped goes
on where it was. Writes results/asr.json, and the claims of both methods into their own files.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import record
import torch

import pared
from pared import recipe
from pared.bench import scaling
from pared.bench.timing import interleave, peak_memory
from pared.bench.words import WordErrors, word_errors
from pared.objectives.ctc import CTC
from pared.speech.recognition import Recogniser, transcribe
from pared.speech.recognition.training import extractor_of, started
from pared.training import generator_for
from pared.worlds.speech.characters import Characters
from pared.worlds.speech.data import TranscriptData
from pared.worlds.speech.sources import kinds_of, utterances

BASE = "relative"
# What each method claims of its errors.
ERRORS = {"rope-asr": "errors-over-relative", "summarymixing-asr": "errors-over-attention"}
ARMS = {BASE: None, "rope-asr": "rope-asr", "summarymixing-asr": "summarymixing-asr"}
RECIPE = record.ROOT / "recipes" / "recognition" / "commands.toml"


def planned(options: argparse.Namespace, arm: str, seed: int) -> recipe.Recipe:
    """The recipe of one arm and seed."""
    methods = json.dumps([ARMS[arm]] if ARMS[arm] else [])
    seeds = [f"{place}.seed={seed}" for place in ("model", "stages.0.training")]
    return recipe.read(options.recipe, [*options.set, *seeds, f"model.methods={methods}"])


def fresh(options: argparse.Namespace, arm: str) -> Recogniser:
    """A recogniser of the recipe with random weights."""
    plan = planned(options, arm, 0)
    extractor = extractor_of(plan.data.extractor)
    return started(plan.model, recipe.build, extractor, Characters())


# Errors -----------------------------------------------------------------------------------------


def heldout(plan: recipe.Recipe, noisy: bool, count: int | None) -> tuple[list[str], list]:
    """Transcripts and sounds of voices and texts that training hasn't; the same at every call."""
    counts = dict.fromkeys(kinds_of(plan.data.source), count) if count else {}
    said = utterances(plan.data.source, "heldout", counts)
    data = TranscriptData(said, snr=plan.data.snr if noisy else None)
    drawn = (data.batch(torch.tensor([n]), generator_for(7, n)) for n in range(len(data)))
    return said.transcripts, [batch["waveform"][0] for batch in drawn]


def errors_of(recogniser: Recogniser, said: list[str], sounds: list) -> WordErrors:
    heard = [" ".join(w.text for w in transcribe(recogniser, [sound])) for sound in sounds]
    return word_errors(said, heard)


def step_seconds(folder: Path) -> float:
    """The median time of a training step, from the lines of a log, whenever it was stopped."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    spent = [
        (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])
        for a, b in pairwise(lines)
        if b["seconds"] > a["seconds"]
    ]
    return statistics.median(spent)


def errors(options: argparse.Namespace) -> None:
    """Train every arm from every seed, and count what each hears wrong."""
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm in ARMS:
            if options.only and arm not in options.only:
                continue
            plan, folder = planned(options, arm, seed), options.folder / f"{arm}-{seed}"
            recogniser = recipe.run(plan, folder)
            if recogniser is None:
                raise SystemExit("stopped; the same command goes on")
            if options.only:
                continue
            samples = utterances(plan.data.source, "train", plan.data.utterances)
            batches = len(samples) // plan.stages[0].training.batch_size
            seconds = batches * step_seconds(folder / "stage-1")
            row: dict[str, Any] = {"epoch": seconds}
            for what in ("noisy", "clean"):
                row[what] = errors_of(
                    recogniser, *heldout(plan, what == "noisy", options.utterances)
                )
                print(arm, seed, what, f"{row[what].rate:.4f}", flush=True)
            found[arm].append(row)
    if not options.only:
        write_errors(found, options)


def write_errors(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    rows = []
    rng = torch.Generator().manual_seed(0)
    for arm, runs in found.items():
        row: dict[str, object] = {"attention": arm}
        for what in ("noisy", "clean"):
            # Of the first seed, whose interval tells how far the utterances decide.
            first, base = runs[0][what], found[BASE][0][what]
            low, high = first.interval(rng)
            rates = [run[what].rate for run in runs]
            row[f"WER {what}"] = round(statistics.mean(rates), 4)
            row[f"over seeds, {what}"] = " ".join(f"{rate:.4f}" for rate in rates)
            row[f"95 %, first seed, {what}"] = f"{low:.4f} to {high:.4f}"
            if arm != BASE:
                between = first.difference(base, rng)
                row[f"against the base, {what}"] = f"{between.low:+.4f} to {between.high:+.4f}"
        row["s per epoch"] = round(statistics.mean(run["epoch"] for run in runs), 2)
        rows.append(row)
    record.write("asr", (), {"word errors": rows, "conditions": conditions(options)})
    for arm, key in ERRORS.items():
        ratios = [
            run["noisy"].rate / max(base["noisy"].rate, 1e-9)
            for run, base in zip(found[arm], found[BASE], strict=True)
        ]
        claim(arm, key, ratios, options.seeds, "On spoken commands in noise, from scratch.")


def claim(slug: str, key: str, values: list[float], seeds: list[int], note: str) -> None:
    spread = statistics.stdev(values) if len(values) > 1 else None
    claimed = record.claim(slug, key, statistics.mean(values), spread, seeds, note)
    record.write(slug, [claimed])


# A step of training -----------------------------------------------------------------------------


class Step:
    """A whole step of training on random sound: forward, backward, AdamW."""

    def __init__(self, options: argparse.Namespace, arm: str) -> None:
        torch.manual_seed(0)
        self.recogniser = fresh(options, arm)
        self.model = self.recogniser.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        samples = round(options.seconds * self.recogniser.rate)
        sounds = [0.1 * torch.randn(samples) for _ in range(options.batch)]
        labels = torch.randint(1, 20, (options.batch, round(8 * options.seconds)))
        lengths = torch.full((options.batch,), labels.shape[1])
        self.batch = self.recogniser.inputs(sounds)
        self.batch |= {"labels": labels, "label_lengths": lengths}

    def __call__(self) -> None:
        loss = CTC()(self.model, self.batch, torch.Generator())["ctc"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def step_memory(options: argparse.Namespace, arm: str) -> int:
    """Bytes of one step at its peak, in a process of its own."""
    step = Step(options, arm)
    return peak_memory(step)


def steps(options: argparse.Namespace) -> None:
    """Time steps of all arms in turn, and measure the memory of each alone."""
    memory = {arm: alone(step_memory, options, arm) for arm in ARMS}
    timings = interleave({arm: Step(options, arm) for arm in ARMS}, options.rounds, 2, BASE)
    rows = [
        {
            "attention": arm,
            "s per step": float(f"{timings[arm].median:.3g}"),
            "base / this, s": round(timings[arm].ratio, 3),
            "10 to 90 %": f"{timings[arm].ratio_low:.3f} to {timings[arm].ratio_high:.3f}",
            "MiB at the peak": round(memory[arm] / 2**20),
            "base / this, MiB": round(memory[BASE] / memory[arm], 3),
        }
        for arm in ARMS
    ]
    for note in timings.verdict.notes:
        print(note)
    title = f"a training step on {options.batch} x {options.seconds:g} s"
    record.write("asr", (), {title: rows, "conditions": conditions(options)})
    told = f"On {options.batch} utterances of {options.seconds:g} s. " + " ".join(
        timings.verdict.notes
    )
    for arm in ERRORS:
        claim(arm, "training-time", [timings[arm].ratio], [0], told)
    ratio = memory[BASE] / memory["summarymixing-asr"]
    claim("summarymixing-asr", "training-memory", [ratio], [0], told)
    claim("rope-asr", "parameters", [spared_parameters() / 1e6], [0], "Counted.")


def spared_parameters() -> int:
    """Parameters of the default Conformer that rotary positions do without."""
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

    with torch.device("meta"):
        model = Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig())
    before = sum(p.numel() for p in model.parameters())
    pared.convert(model, pared.parse("rope-asr"))
    return before - sum(p.numel() for p in model.parameters())


# Length -----------------------------------------------------------------------------------------


def heard_at(options: argparse.Namespace, arm: str, seconds: float) -> dict[str, float] | None:
    """Seconds and bytes of scoring one utterance; None where it doesn't fit the memory."""
    limit = options.gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    recogniser = fresh(options, arm)
    sound = 0.1 * torch.randn(round(seconds * recogniser.rate))
    try:
        recogniser.scores(sound[: recogniser.rate])  # libraries prepare themselves at first use
        bytes_ = peak_memory(lambda: recogniser.scores(sound))
        durations: list[float] = []
        while not durations or (len(durations) < 5 and sum(durations) < 10):
            begun = time.perf_counter()
            recogniser.scores(sound)
            durations.append(time.perf_counter() - begun)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        return None
    return {"length": seconds, "seconds": statistics.median(durations), "bytes": bytes_}


def lengths(options: argparse.Namespace) -> None:
    """Time and memory against the length of an utterance, each in a process of its own."""
    rows, times, memory = [], {}, {}
    for arm in ARMS:
        found = []
        for length in options.lengths:
            if (point := alone(heard_at, options, arm, length)) is None:
                print(arm, length, "doesn't fit", flush=True)
                break
            found.append(point)
            print(arm, json.dumps(point), flush=True)
        rows.append(row_of(arm, found, options))
        times[arm] = [(p["length"], float(f"{p['seconds']:.4g}")) for p in found]
        memory[arm] = [(p["length"], round(p["bytes"] / 2**20, 1)) for p in found]
    tables = {"length of an utterance": rows, "conditions": conditions(options)}
    figures = {
        "time of an utterance": record.curves("seconds of speech", "seconds", times),
        "memory of an utterance": record.curves("seconds of speech", "MiB", memory),
    }
    record.write("asr", (), tables, figures)


def row_of(
    arm: str, found: list[dict[str, float]], options: argparse.Namespace
) -> dict[str, object]:
    """One row: exponents of the last two lengths that fit, and what every length takes."""
    row: dict[str, object] = {"attention": arm}
    for key in ("seconds", "bytes"):
        last = found[-2:]
        fitted = (
            round(scaling.exponent([p["length"] for p in last], [p[key] for p in last]), 3)
            if len(last) == 2
            else None
        )
        row[f"exponent of {key}, last two lengths"] = fitted
    at = {point["length"]: point for point in found}
    for length in options.lengths:
        fits = length in at
        row[f"s at {length:g} s"] = float(f"{at[length]['seconds']:.3g}") if fits else "-"
        row[f"MiB at {length:g} s"] = round(at[length]["bytes"] / 2**20) if fits else "too much"
    return row


# All --------------------------------------------------------------------------------------------


def alone(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a process of its own, so that no other one's memory lies about."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def conditions(options: argparse.Namespace) -> list[dict[str, str]]:
    return [
        {"what": "recipe", "value": os.path.relpath(options.recipe, record.ROOT)},
        {"what": "memory that an utterance may take", "value": f"{options.gigabytes} GiB"},
        {"what": "machine", "value": record.describe_machine()},
        {"what": "commit", "value": record.commit()},
    ]


PARTS = {"errors": errors, "steps": steps, "lengths": lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=ARMS, help="train these and count nothing")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/asr"), help="of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--utterances", type=int, help="held-out ones that are heard; all")
    parser.add_argument("--batch", type=int, default=4, help="utterances of a timed step")
    parser.add_argument("--seconds", type=float, default=12.0, help="that each of them lasts")
    parser.add_argument("--rounds", type=int, default=10, help="of timed steps")
    parser.add_argument("--lengths", type=float, nargs="+", default=[10, 30, 60, 120, 300, 600])
    half = psutil.virtual_memory().total // 2**31
    parser.add_argument("--gigabytes", type=int, default=half, help="that a length may take")
    options = parser.parse_args()
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
