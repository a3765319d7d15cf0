"""What a step of pre-training costs: time and memory of all attentions, and against length."""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import record
import torch
from speech_pretraining_arms import ARMS, BASE, OURS, RECIPES, SLUG, fresh, planned

from pared import recipe
from pared.bench import scaling
from pared.bench.timing import interleave, peak_memory
from pared.objectives.wav2vec2 import Wav2Vec2Pretraining
from pared.speech.pretraining import inputs_of, started
from pared.speech.recognition.training import extractor_of

# A length in seconds, and what a step takes: "seconds" and "MiB".
Point = dict[str, float]


class Step:
    """A whole step of pre-training on random sound: forward, backward, AdamW."""

    def __init__(self, options: argparse.Namespace, arm: str, seconds: float, batch: int) -> None:
        torch.manual_seed(0)
        self.model = fresh(options, arm).train()
        self.objective = Wav2Vec2Pretraining()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        extractor = extractor_of(planned(options, arm, 0).data.extractor)
        sounds = [0.1 * torch.randn(round(seconds * 16_000)) for _ in range(batch)]
        self.batch = inputs_of(extractor, sounds)

    def __call__(self) -> None:
        terms = self.objective(self.model, self.batch, torch.Generator().manual_seed(0))
        sum(terms.values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def step_memory(options: argparse.Namespace, arm: str) -> int:
    """Bytes of one step at its peak."""
    return peak_memory(Step(options, arm, options.seconds, options.sounds))


def steps(options: argparse.Namespace) -> None:
    """Time steps of all arms in turn, and measure the memory of each alone."""
    memory = {arm: alone(step_memory, options, arm) for arm in ARMS}
    calls = {arm: Step(options, arm, options.seconds, options.sounds) for arm in ARMS}
    timings = interleave(calls, options.rounds, 2, BASE)
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
    size = f"{options.sounds} x {options.seconds:g} s"
    kernel = calls[BASE].model.config._attn_implementation
    note = f"By the recipe's model on {size}; positions of both added once, attention by {kernel}."
    note = " ".join([note, *timings.verdict.notes])
    figures = {
        "pretraining-time": (timings[OURS].ratio, note),
        "pretraining-memory": (memory[BASE] / memory[OURS], note),
        "parameters": (paper_parameters() / 1e6, "Counted; its convolutions have no biases here."),
    }
    claims = [record.claim(SLUG, key, one, None, [0], told) for key, (one, told) in figures.items()]
    record.write(SLUG, claims, {f"a pre-training step on {size}": rows})


def paper_parameters() -> int:
    """Parameters of the paper's model, counted on the meta device."""
    table = recipe.read(RECIPES / "paper.toml").model
    with torch.device("meta"):
        model = started(table, recipe.build)
    return sum(p.numel() for p in model.parameters())


# Length -----------------------------------------------------------------------------------------


def stepped_at(options: argparse.Namespace, arm: str, seconds: float) -> Point | None:
    """What a step on one utterance takes; None where it doesn't fit the memory."""
    Step(options, arm, 1.0, 1)()  # libraries prepare themselves at first use
    step = Step(options, arm, seconds, 1)
    try:
        bytes_ = peak_memory(step)
        durations: list[float] = []
        while not durations or (len(durations) < 5 and sum(durations) < 10):
            begun = time.perf_counter()
            step()
            durations.append(time.perf_counter() - begun)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        return None
    mib = max(bytes_, 1) / 2**20
    return {"length": seconds, "seconds": statistics.median(durations), "MiB": mib}


def lengths(options: argparse.Namespace) -> None:
    """Time and memory against the length of an utterance, each in a process of its own."""
    found: dict[str, list[Point]] = {arm: [] for arm in ARMS}
    for arm, points in found.items():
        for length in sorted(options.lengths):
            point = alone(stepped_at, options, arm, length, gigabytes=options.gigabytes)
            if point is None:
                print(arm, length, "doesn't fit", flush=True)
                break
            points.append(point)
            print(arm, json.dumps(point), flush=True)
    over = shared(found, options.floor)
    tables = {
        f"{key} that a step takes, by the length of its utterance": [
            {"attention": arm} | length_row(points, key, over, sorted(options.lengths))
            for arm, points in found.items()
        ]
        for key in ("seconds", "MiB")
    }
    figures = {
        f"{name} of a step": record.curves(
            "seconds of speech",
            key,
            {a: [(p["length"], float(f"{p[key]:.4g}")) for p in found[a]] for a in found},
        )
        for name, key in (("time", "seconds"), ("memory", "MiB"))
    }
    record.write(SLUG, (), tables, figures)


def shared(found: Mapping[str, Sequence[Point]], floor: float) -> list[float]:
    """Lengths that fit the memory with every arm, of those so long that length decides."""
    fitting = [{point["length"] for point in points} for points in found.values()]
    return sorted(length for length in set.intersection(*fitting) if length >= floor)


def length_row(
    points: Sequence[Point], key: str, over: Sequence[float], asked: Sequence[float]
) -> dict[str, Any]:
    """The p of key = c length^p by least squares over some lengths, and what every length takes."""
    at = {point["length"]: point[key] for point in points}
    row: dict[str, Any] = {}
    if len(over) > 1:
        p = scaling.exponent(over, [at[length] for length in over])
        row[f"exponent, {over[0]:g} to {over[-1]:g} s"] = round(p, 3)
    for length in asked:
        fits = length in at
        row[f"{length:g} s"] = float(f"{at[length]:.3g}") if fits else "too much memory"
    return row


# Processes --------------------------------------------------------------------------------------


def alone(call: Callable[..., Any], *arguments: Any, gigabytes: int | None = None) -> Any:
    """What a function gives in a process of its own, so that no other one's memory lies about.

    Args:
        call: the function.
        arguments: of it.
        gigabytes: that the process may take; None for all there are.
    """
    with multiprocessing.get_context("spawn").Pool(1, _limit, (gigabytes,)) as pool:
        return pool.apply(call, arguments)


def _limit(gigabytes: int | None) -> None:
    if gigabytes is not None:
        most = gigabytes * 2**30
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
