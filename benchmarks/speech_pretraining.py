"""Attentions of a Conformer compared as learners from recordings alone, by frozen probes.

    python benchmarks/speech_pretraining.py                     # two hours on two cores
    python benchmarks/speech_pretraining.py --parts steps lengths

Relative positions as in Transformer-XL are the base; rotary positions and SummaryMixing are the
other arms. All are pre-trained by one recipe for as many steps, from the same seeds, on the same
utterances in the same order. Then every encoder is frozen, and probes on its weighted layers write
down what unknown voices say, and name who of the known ones speaks; log-mel frames without any
encoder are probed as well; brought to mean 0 in every utterance, they tell a linear probe nothing
of who speaks. Encoders are fine-tuned on transcripts too, and beside them the same networks that
were never pre-trained. A run that was stopped goes on where it was. Writes
results/summarymixing-ssl.json.
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
from typing import Any

import psutil
import record
import torch

from pared import recipe
from pared.bench import scaling
from pared.bench.timing import interleave, peak_memory
from pared.bench.words import word_errors
from pared.objectives.wav2vec2 import Wav2Vec2Pretraining
from pared.speech import probing
from pared.speech.pretraining import PretrainingData, inputs_of, save, started
from pared.speech.probing import Examples, Probe
from pared.speech.recognition import transcribe
from pared.speech.recognition.training import extractor_of
from pared.training import generator_for
from pared.worlds import speech
from pared.worlds.speech.characters import Characters

SLUG = "summarymixing-ssl"
BASE, OURS = "relative", "summarymixing-asr"
ARMS = {BASE: (), "rope-asr": ("rope-asr",), OURS: (OURS,)}
MEL = "log-mel, no encoder"
RECIPES = record.ROOT / "recipes" / SLUG


def planned(options: argparse.Namespace, arm: str, seed: int) -> recipe.Recipe:
    """The recipe of one arm and seed."""
    methods = json.dumps(["mel-front", *ARMS[arm]])
    seeds = [f"{place}.seed={seed}" for place in ("model", "stages.0.training")]
    return recipe.read(options.recipe, [*options.set, *seeds, f"model.methods={methods}"])


def fresh(options: argparse.Namespace, arm: str) -> Any:
    """A model of the recipe with random weights."""
    return started(planned(options, arm, 0).model, recipe.build)


def trained(plan: recipe.Recipe, folder: Path) -> Any:
    """What a recipe comes to, the same at every call."""
    found = recipe.run(plan, folder)
    if found is None:
        raise SystemExit("stopped; the same command goes on")
    return found


# Probes -----------------------------------------------------------------------------------------


def heard(kind: str, split: str, count: int) -> tuple[list[torch.Tensor], list[str], list[str]]:
    """Sounds, transcripts and speakers of utterances of the speech world."""
    world = speech.load(kind, split, count)
    return [world.waveform(n) for n in range(len(world))], world.transcripts, world.speakers


class Task:
    """What probes are trained and judged on: transcripts, or speakers.

    Args:
        name: "words", judged on voices and texts that training hasn't; or "speakers", on texts
            that it hasn't.
        kind: of the speech world.
        counts: utterances to train, to validate and to judge on.
    """

    def __init__(self, name: str, kind: str, counts: tuple[int, int, int]) -> None:
        self.name, self.characters = name, Characters()
        train, validation, judged = counts
        last = "heldout" if name == "words" else "validation"
        known = heard(kind, "train", train + validation)
        parts = [tuple(x[:train] for x in known), tuple(x[train:] for x in known)]
        parts.append(heard(kind, last, judged))
        self.sounds = [part[0] for part in parts]
        self.said = parts[2][1]
        voices = sorted({voice for part in parts for voice in part[2]})
        self.classes = len(self.characters) if name == "words" else len(voices)
        self.targets = [
            [torch.tensor(self.characters.encode(text)) for text in part[1]]
            if name == "words"
            else [torch.tensor(voices.index(voice)) for voice in part[2]]
            for part in parts
        ]

    def error(self, make: Callable[[list], list], options: argparse.Namespace, seed: int) -> float:
        """Word error rate, or share of speakers named wrongly, of a probe on features."""
        train, validation, judged = (
            Examples(make(sounds), targets)
            for sounds, targets in zip(self.sounds, self.targets, strict=True)
        )
        _, layers, width = train.features[0].shape
        torch.manual_seed(seed)
        probe = Probe(layers, width, self.classes, options.hidden)
        rates = {"rate": options.rate, "epochs": options.epochs, "batch_size": options.batch}
        probing.fit(probe, train, validation, seed=seed, **rates)
        if self.name == "speakers":
            return 1 - probing.accuracy(probe, judged)
        return word_errors(self.said, probing.transcripts(probe, judged, self.characters)).rate


def told_apart(model: Any, plan: recipe.Recipe, count: int) -> dict[str, float]:
    """Contrastive loss, accuracy and codes in use, on utterances that training hasn't."""
    kind = plan.data.source.removeprefix("speech:").partition("+")[0]
    world = speech.load(kind, "validation", count)
    data = PretrainingData(world, extractor_of(plan.data.extractor), plan.data.seconds)
    objective, batches = Wav2Vec2Pretraining(**plan.objective.settings), []
    for number, indices in enumerate(torch.arange(len(world)).split(20)):
        generator = generator_for(11, number)
        batches.append(objective.scores(model.eval(), data.batch(indices, generator), generator))
    names = ("loss", "accuracy", "perplexity")
    return {
        name: float(torch.stack(values).mean())
        for name, values in zip(names, zip(*batches, strict=True), strict=True)
    }


def probes(options: argparse.Namespace) -> None:
    """Pre-train every arm from every seed, and probe it; the mel frames once per seed."""
    tasks = [Task(name, options.kind, tuple(options.utterances)) for name in ("words", "speakers")]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in (*ARMS, MEL)}
    for seed in options.seeds:
        mel = {task.name: task.error(probing.mel_of, options, seed) for task in tasks}
        found[MEL].append(mel)
        print(MEL, seed, json.dumps(mel), flush=True)
        for arm in ARMS:
            plan = planned(options, arm, seed)
            model = trained(plan, options.folder / f"{arm}-{seed}")
            extractor = extractor_of(plan.data.extractor)
            row = told_apart(model, plan, options.utterances[1])

            def layers(sounds: list, model: Any = model, extractor: Any = extractor) -> list:
                return probing.layers_of(model, extractor, sounds)

            row |= {task.name: task.error(layers, options, seed) for task in tasks}
            print(arm, seed, json.dumps(row), flush=True)
            found[arm].append(row)
    write_probes(found, options)


def write_probes(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    columns = {
        "words": "WER of a probe, unknown voices",
        "speakers": "speakers named wrongly",
        "loss": "contrastive loss",
        "accuracy": "frames told apart",
        "perplexity": "codes in use",
    }
    rows = []
    for arm, runs in found.items():
        row: dict[str, object] = {"encoder": arm}
        for key, title in columns.items():
            values = [run[key] for run in runs if key in run]
            row[title] = round(statistics.mean(values), 4) if values else "-"
            row[f"{title}, over seeds"] = " ".join(f"{value:.4f}" for value in values) or "-"
        rows.append(row)
    record.write(SLUG, (), {"frozen probes": rows, "conditions": conditions(options)})
    ratios = [
        run["words"] / max(base["words"], 1e-9)
        for run, base in zip(found[OURS], found[BASE], strict=True)
    ]
    probe = f"an LSTM of {options.hidden}" if options.hidden else "a linear probe"
    note = f"{columns['words']}: {options.kind} of the speech world, {probe} with CTC."
    claim("probe-errors", ratios, options.seeds, note)


def claim(key: str, values: list[float], seeds: list[int], note: str) -> None:
    spread = statistics.stdev(values) if len(values) > 1 else None
    claimed = record.claim(SLUG, key, statistics.mean(values), spread, seeds, note)
    record.write(SLUG, [claimed])


# Fine-tuning --------------------------------------------------------------------------------------


def tuned(options: argparse.Namespace, encoder: Path, seed: int) -> float:
    """Word error rate on unknown voices of a recogniser that starts from a saved encoder."""
    seeds = [f"{place}.seed={seed}" for place in ("model", "stages.0.training")]
    plan = recipe.read(options.tuning, [*seeds, f"model.from={encoder}"])
    recogniser = trained(plan, encoder.parent / "tuned")
    sounds, said, _ = heard(options.kind, "heldout", options.utterances[2])
    read = [" ".join(word.text for word in transcribe(recogniser, [sound])) for sound in sounds]
    return word_errors(said, read).rate


def tuning(options: argparse.Namespace) -> None:
    """Fine-tune every arm from every seed, pre-trained and not."""
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        for arm in ARMS:
            plan = planned(options, arm, seed)
            known, blank = (options.folder / f"{arm}-{seed}{end}" for end in ("", "-fresh"))
            trained(plan, known)
            model = started(plan.model, recipe.build)
            save(model, extractor_of(plan.data.extractor), blank / "model")
            for name, place in ((arm, known), (f"{arm}, not pre-trained", blank)):
                found.setdefault(name, []).append(tuned(options, place / "model", seed))
                print(name, seed, f"{found[name][-1]:.4f}", flush=True)
    rows = [
        {
            "encoder": name,
            "WER, unknown voices": round(statistics.mean(rates), 4),
            "over seeds": " ".join(f"{rate:.4f}" for rate in rates),
        }
        for name, rates in found.items()
    ]
    record.write(SLUG, (), {"fine-tuned recognisers": rows, "conditions": conditions(options)})


# A step of pre-training ---------------------------------------------------------------------------


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
    """Bytes of one step at its peak, in a process of its own."""
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
    title = f"a pre-training step on {size}"
    record.write(SLUG, (), {title: rows, "conditions": conditions(options)})
    notes = " ".join(timings.verdict.notes)
    told = f"Over relative positions, by the recipe's model on {size}. {notes}".strip()
    claim("pretraining-time", [timings[OURS].ratio], [0], told)
    claim("pretraining-memory", [memory[BASE] / memory[OURS]], [0], told)
    count = paper_parameters() / 1e6
    claim("parameters", [count], [0], "Counted; its convolutions have no biases here.")


def paper_parameters() -> int:
    """Parameters of the paper's model, counted on the meta device."""
    table = recipe.read(RECIPES / "paper.toml").model
    with torch.device("meta"):
        model = started(table, recipe.build)
    return sum(p.numel() for p in model.parameters())


# Length -----------------------------------------------------------------------------------------


def stepped_at(options: argparse.Namespace, arm: str, seconds: float) -> dict[str, float] | None:
    """Seconds and bytes of a step on one utterance; None where it doesn't fit the memory."""
    limit = options.gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
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
    return {"length": seconds, "seconds": statistics.median(durations), "bytes": bytes_}


def lengths(options: argparse.Namespace) -> None:
    """Time and memory against the length of an utterance, each in a process of its own."""
    rows, times, memory = [], {}, {}
    for arm in ARMS:
        found = []
        for length in options.lengths:
            if (point := alone(stepped_at, options, arm, length)) is None:
                print(arm, length, "doesn't fit", flush=True)
                break
            found.append(point)
            print(arm, json.dumps(point), flush=True)
        rows.append(row_of(arm, found, options))
        times[arm] = [(p["length"], float(f"{p['seconds']:.4g}")) for p in found]
        memory[arm] = [(p["length"], round(p["bytes"] / 2**20, 1)) for p in found]
    tables = {"length of an utterance": rows, "conditions": conditions(options)}
    figures = {
        "time of a step": record.curves("seconds of speech", "seconds", times),
        "memory of a step": record.curves("seconds of speech", "MiB", memory),
    }
    record.write(SLUG, (), tables, figures)


def row_of(
    arm: str, found: list[dict[str, float]], options: argparse.Namespace
) -> dict[str, object]:
    """One row: exponents of the last two lengths that fit, and what every length takes."""
    row: dict[str, object] = {"attention": arm}
    last = found[-2:]
    for key in ("seconds", "bytes"):
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
        {"what": "machine", "value": record.describe_machine()},
        {"what": "commit", "value": record.commit()},
    ]


PARTS = {"probes": probes, "tuning": tuning, "steps": steps, "lengths": lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--recipe", type=Path, default=RECIPES / "mini.toml")
    parser.add_argument("--tuning", type=Path, default=RECIPES / "finetune-mini.toml")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/ssl"), help="of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kind", default="digits", help="of the speech world, for probes")
    parser.add_argument(
        "--utterances", type=int, nargs=3, default=[800, 80, 160],
        help="that probes learn from, are validated on and are judged on",
    )  # fmt: skip
    parser.add_argument("--hidden", type=int, help="units of a probe's LSTM; without, it's linear")
    parser.add_argument("--rate", type=float, default=1e-2, help="at which a probe learns")
    parser.add_argument("--epochs", type=int, default=40, help="of a probe")
    parser.add_argument("--batch", type=int, default=8, help="utterances of a probe's step")
    parser.add_argument("--sounds", type=int, default=4, help="utterances of a timed step")
    parser.add_argument("--seconds", type=float, default=15.0, help="that each of them lasts")
    parser.add_argument("--rounds", type=int, default=10, help="of timed steps")
    parser.add_argument("--lengths", type=float, nargs="+", default=[5, 10, 20, 40, 80])
    half = psutil.virtual_memory().total // 2**31
    parser.add_argument("--gigabytes", type=int, default=half, help="that a length may take")
    options = parser.parse_args()
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
