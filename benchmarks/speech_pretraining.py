"""Attentions of a Conformer compared as learners from recordings alone, by frozen probes.

    python benchmarks/speech_pretraining.py                            # ninety minutes on one core
    python benchmarks/speech_pretraining.py --only relative --seeds 0  # some, for several processes
    python benchmarks/speech_pretraining.py --kept                     # sum up what is done
    python benchmarks/speech_pretraining.py --parts steps lengths

SummaryMixing is compared with the paper's twin: self-attention whose positions, as its own, are
sinusoids that are added once. Relative positions as in Transformer-XL and rotary ones are rows
beside them. All are pre-trained by one recipe for as many steps, from the same seeds, on the same
utterances in the same order, with the same dropout, their convolutions kept from hearing padding.
Then every encoder is frozen, and probes on its weighted layers write down what unknown voices say,
name who of the known ones speaks, and tell what unknown voices want. The same is asked of an
encoder with random weights, and of log-mel frames; brought to mean 0 in every utterance, they tell
a linear probe nothing of who speaks. A run that was stopped goes on where it was. Writes
results/summarymixing-ssl.json; what is done is kept under runs/ssl.
"""

import argparse
import json
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import record
import seeded
import speech_costs
import torch
from speech_pretraining_arms import ARMS, BASE, OURS, RECIPES, SLUG, built, fresh, planned
from speech_pretraining_costs import lengths, steps
from speech_pretraining_probes import TASKS, Reader, probed

from pared import recipe
from pared.objectives.wav2vec2 import Wav2Vec2Pretraining
from pared.speech import pretraining, probing
from pared.speech.encoders import extractor_of
from pared.training import generator_for
from pared.worlds.speech import grammar
from pared.worlds.speech.sources import kinds_of, utterances

# Rows beside the arms.
UNTRAINED, MEL = "not-pretrained", "log-mel"
ROWS = {arm: arm for arm in ARMS} | {
    UNTRAINED: f"{OURS}, not pre-trained",
    MEL: "log-mel, no encoder",
}
SCORES = {
    "loss": "contrastive loss",
    "accuracy": "frames told apart",
    "perplexity": "codes in use",
}
# What the claims hang on runs with every seed, the rest with one.
DECISIVE = (OURS, BASE)
# How either way of doing better is counted: against the twin from the same seed.
PROBED = {"words": "probe-errors", "voices": "probe-voices", "intents": "probe-intents"}

Figures = dict[str, float]


class Bench:
    """Pre-trains and probes; what is done is kept by what it was asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.folder.mkdir(parents=True, exist_ok=True)

    def trained(self, row: str, seed: int) -> Path:
        """Where a row is pre-trained: one folder for all that decides its weights, no more."""
        told = seeded.told(planned(self.options, row if row in ARMS else OURS, seed))
        return self.options.folder / f"{row}-{seed}-{seeded.digest(told)}"

    def path(self, row: str, seed: int) -> Path:
        """Where the figures of a row are kept: beside its weights, named by the probes."""
        asked = seeded.digest([self.options.utterances, repr(TASKS)])
        return self.trained(row, seed).with_suffix(f".{asked}.json")

    def done(self, row: str, seed: int) -> Figures:
        """The figures of a row; kept once they are there."""
        path = self.path(row, seed)
        if not path.exists():
            figures = self.figures(row, seed)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(figures))
            os.replace(partial, path)
        return json.loads(path.read_text())

    def figures(self, row: str, seed: int) -> Figures:
        """How well a row does, pre-trained first where it is an arm."""
        if row == MEL:
            return probed(probing.mel_of, self.options, seed)
        if row == UNTRAINED:
            return probed(self.reader(fresh(self.options, OURS, seed)), self.options, seed)
        plan = planned(self.options, row, seed)
        recipe.check(plan)
        model = pretraining.run(plan, self.trained(row, seed), built)
        if model is None:
            raise SystemExit(130)
        told = told_apart(model.cpu(), plan, self.options.utterances[1])
        return told | probed(self.reader(model), self.options, seed)

    def reader(self, model: Any) -> Reader:
        """The layers of a frozen model."""
        extractor = extractor_of(planned(self.options, BASE, 0).data.extractor)
        return lambda sounds: probing.layers_of(model, extractor, sounds)


def told_apart(model: Any, plan: recipe.Recipe, count: int) -> Figures:
    """Contrastive loss, accuracy and codes in use, on utterances that training hasn't.

    Args:
        model: pre-trained.
        plan: by which.
        count: utterances of each kind.
    """
    kinds = dict.fromkeys(kinds_of(plan.data.source), count)
    said = utterances(plan.data.source, "validation", kinds)
    data = pretraining.PretrainingData(said, extractor_of(plan.data.extractor), plan.data.seconds)
    objective, batches = Wav2Vec2Pretraining(**plan.objective.settings), []
    for number, indices in enumerate(torch.arange(len(data)).split(20)):
        generator = generator_for(11, number)
        batches.append(objective.scores(model.eval(), data.batch(indices, generator), generator))
    return {
        name: float(torch.stack(values).mean())
        for name, values in zip(SCORES, zip(*batches, strict=True), strict=True)
    }


def probes(options: argparse.Namespace) -> None:
    """Pre-train every arm from every seed and probe it; write, unless only some were asked for."""
    bench = Bench(options)
    found: dict[str, dict[int, Figures]] = {}
    for seed, row in seeded.pairs(options.seeds, options.only or ROWS, DECISIVE):
        if options.kept and not bench.path(row, seed).exists():
            continue
        found.setdefault(row, {})[seed] = bench.done(row, seed)
        print(row, seed, json.dumps(found[row][seed]), flush=True)
    if not options.only:
        rows = [row_of(ROWS[row], list(runs.values())) for row, runs in found.items()]
        tables = {"frozen probes": rows, "conditions": conditions(options)}
        record.write(SLUG, claims_of(found, options), tables)


def row_of(title: str, runs: list[Figures]) -> dict[str, Any]:
    """One row: means over seeds, and the figures of all."""
    row: dict[str, Any] = {"encoder": title, "seeds": len(runs)}
    for key, about in ({name: task.about for name, task in TASKS.items()} | SCORES).items():
        values = [run[key] for run in runs if key in run]
        row[about] = round(statistics.mean(values), 4) if values else "-"
        row[f"{about}, over seeds"] = " ".join(f"{value:.4f}" for value in values) or "-"
    return row


def claims_of(found: dict[str, dict[int, Figures]], options: argparse.Namespace) -> list[Any]:
    """SummaryMixing against its twin, paired by seed: ratios of errors, differences of shares."""
    ours, twin = (found.get(arm, {}) for arm in (OURS, BASE))
    seeds = [seed for seed in ours if seed in twin]
    if not seeds:
        return []
    train, _, judged = options.utterances
    claims = []
    for name, key in PROBED.items():
        both = [(ours[seed][name], twin[seed][name]) for seed in seeds]
        values = [a / max(b, 1e-9) if name == "words" else a - b for a, b in both]
        means = [statistics.mean(runs) for runs in zip(*both, strict=True)]
        note = (
            f"{TASKS[name].about}: {means[0]:.3f} against {means[1]:.3f} on {judged} utterances of "
            f"the speech world, learnt from {train}."
        )
        claims.append(seeded.claim(SLUG, key, values, seeds, note))
    return claims


def conditions(options: argparse.Namespace) -> list[dict[str, str]]:
    train, validation, judged = options.utterances
    plan = planned(options, BASE, 0)
    training = plan.stages[0].training
    wanted = Counter(map(grammar.intent_of, grammar.texts("commands", "heldout", judged)))
    common = max(wanted.values()) / judged
    told = {
        "recipe": os.path.relpath(options.recipe, record.ROOT),
        "pre-training": f"{training.steps} steps of {training.batch_size} x "
        f"{plan.data.seconds:g} s of {plan.data.source}",
        "probes": f"learn from {train} utterances, {validation} choose the epoch, {judged} judge",
        "LSTM probe": f"2 layers of {TASKS['words'].units} units in either direction, Adam at "
        f"{TASKS['words'].rate:g}; words by CTC, intents by the mean over frames",
        "intents": f"{len(wanted)}; the commonest has a share of {common:.2f}",
    }
    return record.conditions(told)


PARTS = {"probes": probes, "steps": steps, "lengths": lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=ROWS, help="probe these and write nothing")
    parser.add_argument("--kept", action="store_true", help="sum up what is done; train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", type=Path, default=RECIPES / "probed.toml")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/ssl"), help="of the runs")
    parser.add_argument(
        "--utterances", type=int, nargs=3, default=[400, 60, 300],
        help="that probes learn from, are validated on and are judged on",
    )  # fmt: skip
    parser.add_argument("--sounds", type=int, default=4, help="utterances of a timed step")
    parser.add_argument("--seconds", type=float, default=15.0, help="that each of them lasts")
    parser.add_argument("--rounds", type=int, default=10, help="of timed steps")
    speech_costs.add_options(parser, [5, 10, 20, 40, 60, 80], floor=20)
    options = parser.parse_args()
    for part in ["probes"] if options.only or options.kept else options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
