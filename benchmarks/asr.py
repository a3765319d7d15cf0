"""Attentions of a Conformer compared as recognisers: errors, cost of training, cost of length.

    python benchmarks/asr.py                     # two hours on two cores
    python benchmarks/asr.py --only relative     # train these, for several processes
    python benchmarks/asr.py --parts lengths

Relative positions as in Transformer-XL are the base; rotary positions and SummaryMixing are the
other arms. All are trained by one recipe, from the same seeds, on the same utterances in the same
order, with the same dropout, their convolutions kept from hearing padding; then they write down
what voices say that none has met, in noise and without. A run that was stopped goes on where it
was. Writes results/asr.json, and the claims of both methods into their own files.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import record
import torch

import pared
from pared import recipe
from pared.bench import scaling
from pared.bench.timing import Timings, interleave, peak_memory
from pared.bench.words import WordErrors, word_errors
from pared.objectives.ctc import CTC
from pared.speech.hearing import leave_out_padding
from pared.speech.recognition import Recogniser, training, transcribe
from pared.training import generator_for
from pared.worlds.speech.audio import RATE
from pared.worlds.speech.characters import Characters
from pared.worlds.speech.data import TranscriptData
from pared.worlds.speech.sources import kinds_of, utterances

BASE, ROPE, MEAN = "relative", "rope-asr", "summarymixing-asr"
ARMS = (BASE, ROPE, MEAN)
# What each method claims of its errors.
ERRORS = {ROPE: "errors-over-relative", MEAN: "errors-over-attention"}
RECIPE = record.ROOT / "recipes" / "recognition" / "sentences.toml"


def planned(options: argparse.Namespace, arm: str, seed: int) -> recipe.Recipe:
    """The recipe of one arm and seed; the mixer drops what the recipe lets attentions drop."""
    plan = recipe.read(options.recipe, options.set)
    dropout = plan.model.config.get("attention_dropout", 0.1)
    methods = {BASE: [], ROPE: [ROPE], MEAN: [f"{MEAN}:dropout={dropout}"]}[arm]
    seeds = [f"{place}.seed={seed}" for place in ("model", "stages.0.training")]
    changes = [*options.set, *seeds, f"model.methods={json.dumps(methods)}"]
    return recipe.read(options.recipe, changes)


def built(table: recipe.ModelTable) -> Any:
    """The model of a recipe; where no method does it, its convolutions leave padding out too."""
    model = recipe.build(table)
    if not table.methods:
        leave_out_padding(model)
    return model


def fresh(options: argparse.Namespace, arm: str) -> Recogniser:
    """A recogniser of the recipe with random weights."""
    plan = planned(options, arm, 0)
    extractor = training.extractor_of(plan.data.extractor)
    return training.started(plan.model, built, extractor, Characters())


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


def errors(options: argparse.Namespace) -> None:
    """Train every arm from every seed, and count what each hears wrong."""
    found: dict[str, list[dict[str, WordErrors]]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm in options.only or ARMS:
            plan, folder = planned(options, arm, seed), options.folder / f"{arm}-{seed}"
            recipe.check(plan)
            recogniser = training.run(plan, folder, built)
            if recogniser is None:
                raise SystemExit("stopped; the same command goes on")
            if options.only:
                continue
            row = {}
            for what in ("noisy", "clean"):
                told = heldout(plan, what == "noisy", options.utterances)
                row[what] = errors_of(recogniser, *told)
                print(arm, seed, what, f"{row[what].rate:.4f}", flush=True)
            found[arm].append(row)
    if not options.only:
        write_errors(found, options)


def write_errors(
    found: dict[str, list[dict[str, WordErrors]]], options: argparse.Namespace
) -> None:
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
        row["parameters"] = sum(p.numel() for p in fresh(options, arm).model.parameters())
        rows.append(row)
    record.write("asr", (), {"word errors": rows, "conditions": conditions(options)})
    source = planned(options, BASE, 0).data.source
    told = f"On {source} in noise, by unknown voices, from scratch."
    for arm, key in ERRORS.items():
        ratios = [
            run["noisy"].rate / max(base["noisy"].rate, 1e-9)
            for run, base in zip(found[arm], found[BASE], strict=True)
        ]
        claim(arm, key, ratios, options.seeds, told)


def claim(slug: str, key: str, values: list[float], seeds: list[int], note: str) -> None:
    spread = statistics.stdev(values) if len(values) > 1 else None
    claimed = record.claim(slug, key, statistics.mean(values), spread, seeds, note)
    record.write(slug, [claimed])


# A step of training -----------------------------------------------------------------------------


class Size(NamedTuple):
    """Of a batch: how many utterances, and how many seconds each lasts."""

    batch: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.batch} x {self.seconds:g} s"


class Step:
    """A whole step of training on random sound: forward, backward, AdamW."""

    def __init__(self, options: argparse.Namespace, arm: str, size: Size) -> None:
        torch.manual_seed(0)
        self.recogniser = fresh(options, arm)
        self.model = self.recogniser.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        samples = round(size.seconds * self.recogniser.rate)
        sounds = [0.1 * torch.randn(samples) for _ in range(size.batch)]
        labels = torch.randint(1, 20, (size.batch, round(8 * size.seconds)))
        lengths = torch.full((size.batch,), labels.shape[1])
        self.batch = self.recogniser.inputs(sounds)
        self.batch |= {"labels": labels, "label_lengths": lengths}

    def __call__(self) -> None:
        loss = CTC()(self.model, self.batch, torch.Generator())["ctc"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def step_memory(options: argparse.Namespace, arm: str, size: Size) -> int:
    """Bytes of one step at its peak."""
    return peak_memory(Step(options, arm, size))


def usual(options: argparse.Namespace) -> tuple[Size, int]:
    """The recipe's batch, its utterances of mean length, and the steps of an epoch."""
    plan = planned(options, BASE, 0)
    said = utterances(plan.data.source, plan.data.split, plan.data.utterances, plan.data.on_bad)
    batch = plan.stages[0].training.batch_size
    # On either side half the greatest silence, on average.
    seconds = statistics.mean(said.lengths) / RATE + TranscriptData.silence
    return Size(batch, round(seconds, 1)), len(said) // batch


def timed(options: argparse.Namespace, size: Size) -> Timings:
    timings = interleave({arm: Step(options, arm, size) for arm in ARMS}, options.rounds, 2, BASE)
    for note in timings.verdict.notes:
        print(note)
    return timings


def rows_of(timings: Timings) -> list[dict[str, Any]]:
    return [
        {
            "attention": arm,
            "s per step": float(f"{timing.median:.3g}"),
            "base / this, s": round(timing.ratio, 3),
            "10 to 90 %": f"{timing.ratio_low:.3f} to {timing.ratio_high:.3f}",
        }
        for arm, timing in timings.items()
    ]


def steps(options: argparse.Namespace) -> None:
    """Time steps of all arms in turn, of the recipe's size and longer, and their memory alone."""
    size, epoch = usual(options)
    timings = timed(options, size)
    short = rows_of(timings)
    for row, timing in zip(short, timings.values(), strict=True):
        row |= {"utterances": str(size), "steps of an epoch": epoch}
        row["s per epoch"] = float(f"{epoch * timing.median:.3g}")
    size_long = Size(options.batch, options.seconds)
    memory = {arm: alone(step_memory, options, arm, size_long) for arm in ARMS}
    timings = timed(options, size_long)
    long = rows_of(timings)
    for row in long:
        row["MiB at the peak"] = round(memory[row["attention"]] / 2**20)
        row["base / this, MiB"] = round(memory[BASE] / memory[row["attention"]], 3)
    tables = {
        "a training step as in the recipe": short,
        f"a training step on {size_long}": long,
        "conditions": conditions(options),
    }
    record.write("asr", (), tables)
    told = " ".join([f"A step on {size_long}.", *timings.verdict.notes])
    for arm in ERRORS:
        claim(arm, "training-time", [timings[arm].ratio], [0], told)
    claim(MEAN, "training-memory", [memory[BASE] / memory[MEAN]], [0], told)
    claim(ROPE, "parameters", [spared_parameters() / 1e6], [0], "Counted.")


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
    """Seconds and MiB of scoring one utterance; None where it doesn't fit the memory."""
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
    return {
        "length": seconds,
        "seconds": statistics.median(durations),
        "MiB": max(bytes_, 1) / 2**20,
    }


def lengths(options: argparse.Namespace) -> None:
    """Time and memory against the length of an utterance, each in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for arm, points in found.items():
        for length in options.lengths:
            point = alone(heard_at, options, arm, length, gigabytes=options.gigabytes)
            if point is None:
                print(arm, length, "doesn't fit", flush=True)
                break
            points.append(point)
            print(arm, json.dumps(point), flush=True)
    over = shared(found, options.floor)
    seconds, mib = (
        [{"attention": arm} | row_of(points, key, over, options) for arm, points in found.items()]
        for key in ("seconds", "MiB")
    )
    times = {a: [(p["length"], float(f"{p['seconds']:.4g}")) for p in found[a]] for a in found}
    memory = {a: [(p["length"], round(p["MiB"], 1)) for p in found[a]] for a in found}
    tables = {
        "seconds that an utterance takes, by its length": seconds,
        "MiB that an utterance takes, by its length": mib,
        "conditions": conditions(options),
    }
    figures = {
        "time of an utterance": record.curves("seconds of speech", "seconds", times),
        "memory of an utterance": record.curves("seconds of speech", "MiB", memory),
    }
    record.write("asr", (), tables, figures)


def shared(found: dict[str, list[dict[str, float]]], floor: float) -> list[float]:
    """Lengths that fit the memory with every arm, of those so long that length decides."""
    fitting = [{point["length"] for point in points} for points in found.values()]
    return sorted(length for length in set.intersection(*fitting) if length >= floor)


def row_of(
    points: list[dict[str, float]], key: str, over: list[float], options: argparse.Namespace
) -> dict[str, object]:
    """The p of key = c length^p by least squares on logarithms, and what every length takes."""
    at = {point["length"]: point[key] for point in points}
    row: dict[str, object] = {}
    if len(over) > 1:
        fitted = scaling.exponent(over, [at[length] for length in over])
        row[f"exponent, {over[0]:g} to {over[-1]:g} s"] = round(fitted, 3)
    row |= {
        f"{length:g} s": float(f"{at[length]:.3g}") if length in at else "too much memory"
        for length in options.lengths
    }
    return row


# All --------------------------------------------------------------------------------------------


def alone(call: Callable[..., Any], *arguments: Any, gigabytes: int | None = None) -> Any:
    """What a function gives in a process of its own, so that no other one's memory lies about.

    Args:
        call: the function.
        arguments: of it.
        gigabytes: that the process may take; None for all there are.
    """
    with multiprocessing.get_context("spawn").Pool(1, limit, (gigabytes,)) as pool:
        return pool.apply(call, arguments)


def limit(gigabytes: int | None) -> None:
    """Let this process take no more memory."""
    if gigabytes is not None:
        most = gigabytes * 2**30
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


SAME = (
    "seeds, utterances and their order, optimiser and steps, dropout of attention maps or of what "
    "is merged, convolutions that leave padding out"
)


def conditions(options: argparse.Namespace) -> list[dict[str, str]]:
    return [
        {"what": "recipe", "value": os.path.relpath(options.recipe, record.ROOT)},
        {"what": "the same in all arms", "value": SAME},
        {"what": "positions", "value": "relative; rotary; sinusoids added once"},
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
    parser.add_argument("--batch", type=int, default=4, help="long utterances of a timed step")
    parser.add_argument("--seconds", type=float, default=12.0, help="that each of them lasts")
    parser.add_argument("--rounds", type=int, default=10, help="of timed steps")
    lengths_ = [10, 30, 60, 90, 120, 180, 300, 600]
    parser.add_argument("--lengths", type=float, nargs="+", default=lengths_, help="in seconds")
    parser.add_argument("--floor", type=float, default=60, help="length that exponents begin at")
    half = psutil.virtual_memory().total // 2**31
    parser.add_argument("--gigabytes", type=int, default=half, help="that a length may take")
    options = parser.parse_args()
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
