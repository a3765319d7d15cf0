"""What a step of pre-training costs: time and memory of all attentions, and against length."""

import argparse

import record
import speech_costs
import torch
from speech_pretraining_arms import ARMS, BASE, OURS, RECIPES, SLUG, fresh, planned

from pared import recipe
from pared.bench.timing import interleave, peak_memory
from pared.objectives.wav2vec2 import Wav2Vec2Pretraining
from pared.speech.encoders import extractor_of, inputs_of
from pared.speech.pretraining import started


def step_of(options: argparse.Namespace, arm: str, seconds: float, batch: int) -> speech_costs.Step:
    """A step of pre-training on random sound."""
    torch.manual_seed(0)
    model, plan = fresh(options, arm), planned(options, arm, 0)
    sounds = [0.1 * torch.randn(round(seconds * 16_000)) for _ in range(batch)]
    inputs = inputs_of(extractor_of(plan.data.extractor), sounds, "input_values")
    objective = Wav2Vec2Pretraining(**plan.objective.settings)
    return speech_costs.Step(model, objective, inputs, plan.stages[0].training)


def step_memory(options: argparse.Namespace, arm: str) -> int:
    """Bytes of one step at its peak."""
    return peak_memory(step_of(options, arm, options.seconds, options.sounds))


def steps(options: argparse.Namespace) -> None:
    """Time steps of all arms in turn, and measure the memory of each alone."""
    memory = {arm: speech_costs.alone(step_memory, options, arm) for arm in ARMS}
    calls = {arm: step_of(options, arm, options.seconds, options.sounds) for arm in ARMS}
    timings = interleave(calls, options.rounds, 2, BASE)
    rows = speech_costs.rows_of(timings, memory)
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


def stepped_at(options: argparse.Namespace, arm: str, seconds: float) -> speech_costs.Point | None:
    """What a step on one utterance takes."""
    step_of(options, arm, 1.0, 1)()  # libraries prepare themselves at first use
    return speech_costs.point_of(step_of(options, arm, seconds, 1), seconds)


def lengths(options: argparse.Namespace) -> None:
    """Time and memory against the length of an utterance, each in a process of its own."""
    tables, figures = speech_costs.by_length(
        stepped_at, options, ARMS, "a step", "the length of its utterance"
    )
    record.write(SLUG, (), tables, figures)
