"""Attentions of a Conformer compared as recognisers: errors, cost of training, cost of length.

    python benchmarks/asr.py                     # two hours on two cores
    python benchmarks/asr.py --only relative     # train these, for several processes
    python benchmarks/asr.py --parts lengths

Relative positions as in Transformer-XL are the base; rotary positions and SummaryMixing are the
other arms, the latter without positions and once more with sinusoids added in front of the blocks,
as its paper has it. All are trained by one recipe, from the same seeds, on the same utterances in
the same order, with the same dropout, their convolutions kept from hearing padding; then they write
down what voices say that none has met, in noise and without. A run that was stopped goes on where
it was. Writes results/asr.json, and the claims of both methods into their own files.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import record
import seeded
import speech_costs
import torch
from recognised import errors_of, sounds_of

import pared
from pared import recipe
from pared.bench.timing import Timings, interleave, peak_memory
from pared.bench.words import WordErrors
from pared.errors import InputError
from pared.objectives.ctc import CTC
from pared.speech.encoders import extractor_of
from pared.speech.hearing import leave_out_padding
from pared.speech.recognition import Recogniser, training
from pared.worlds.readers.speech import Corpus
from pared.worlds.speech import Speech
from pared.worlds.speech.audio import RATE
from pared.worlds.speech.characters import Characters
from pared.worlds.speech.data import TranscriptData
from pared.worlds.speech.sources import kinds_of, utterances

BASE, ROPE, MEAN = "relative", "rope-asr", "summarymixing-asr"
PLACED = f"{MEAN}+sinusoids"
ARMS = (BASE, ROPE, MEAN, PLACED)
# Sinusoids cost nothing to speak of.
TIMED = (BASE, ROPE, MEAN)
# What each method claims of its errors.
ERRORS = {ROPE: "errors-over-relative", MEAN: "errors-over-attention"}
RECIPE = record.ROOT / "recipes" / "recognition" / "sentences.toml"


def planned(options: argparse.Namespace, arm: str, seed: int) -> recipe.Recipe:
    """The recipe of one arm and seed; the mixer drops what the recipe lets attentions drop."""
    plan = recipe.read(options.recipe, options.set)
    dropout = plan.model.config.get("attention_dropout", 0.1)
    mixer = f"{MEAN}:dropout={dropout}"
    methods = {
        BASE: (),
        ROPE: (ROPE,),
        MEAN: (f"{mixer},positions=none",),
        PLACED: (mixer,),
    }
    return seeded.planned(plan, seed, methods=methods[arm])


def built(table: recipe.ModelTable) -> Any:
    """The model of a recipe; where no method does it, its convolutions leave padding out too."""
    model = recipe.build(table)
    if not table.methods:
        leave_out_padding(model)
    return model


def fresh(options: argparse.Namespace, arm: str) -> Recogniser:
    """A recogniser of the recipe with random weights."""
    plan = planned(options, arm, 0)
    extractor = extractor_of(plan.data.extractor)
    return training.started(plan.model, built, extractor, Characters())


# Errors -----------------------------------------------------------------------------------------


def heldout(options: argparse.Namespace) -> Speech | Corpus:
    """What voices say that training hasn't, several of them.

    Raises:
        InputError: it isn't known who speaks, or only one voice does.
    """
    source, count = planned(options, BASE, 0).data.source, options.utterances
    said = utterances(source, "heldout", dict.fromkeys(kinds_of(source), count) if count else {})
    voices = set(said.speakers)
    if None in voices or len(voices) < 2:
        fault = "lacks names of speakers" if None in voices else "is said by one voice"
        raise InputError(
            f"what {source!r} holds out {fault}; intervals come from resampling voices, so give "
            "two at least, and say who speaks."
        )
    return said


def errors(options: argparse.Namespace) -> None:
    """Train every arm from every seed, and count what each hears wrong."""
    said = heldout(options)
    found: dict[str, list[dict[str, WordErrors]]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm in options.only or ARMS:
            plan = planned(options, arm, seed)
            recogniser = trained(plan, place_of(options, arm, plan))
            if not options.only:
                found[arm].append(misheard(recogniser, said, plan, f"{arm} {seed}"))
    if not options.only:
        write_errors(found, said.speakers, options)


def place_of(options: argparse.Namespace, name: str, plan: recipe.Recipe) -> Path:
    """Where a training lies: another recipe has another folder."""
    return options.folder / f"{name}-{plan.model.seed}-{seeded.digest(seeded.told(plan))}"


def trained(plan: recipe.Recipe, folder: Path) -> Recogniser:
    """What a recipe trains; if it was interrupted, the script ends."""
    recipe.check(plan)
    if (recogniser := training.run(plan, folder, built)) is None:
        raise SystemExit("stopped; the same command goes on")
    return recogniser


def misheard(
    recogniser: Recogniser, said: Speech | Corpus, plan: recipe.Recipe, label: str
) -> dict[str, WordErrors]:
    """The errors in noise as in training, and without, by these words; rates are printed."""
    found = {}
    for what, snr in (("noisy", plan.data.snr), ("clean", None)):
        found[what] = errors_of(recogniser, said.transcripts, sounds_of(said, snr))
        print(label, what, f"{found[what].rate:.4f}", flush=True)
    return found


def write_errors(
    found: dict[str, list[dict[str, WordErrors]]],
    voices: Sequence[str | None],
    options: argparse.Namespace,
) -> None:
    """Write the table of errors and their claims.

    Args:
        found: errors in noise and without by arm, a run from each seed.
        voices: who says each utterance.
        options: of the command.
    """
    rows = []
    rng = torch.Generator().manual_seed(0)
    seeds = "seed " if len(options.seeds) == 1 else "mean of seeds "
    seeds += " ".join(map(str, options.seeds))
    resampled = f"{len(set(voices))} voices resampled"
    for arm, runs in found.items():
        row: dict[str, object] = {"attention": arm}
        for what in ("noisy", "clean"):
            # Seeds are too few to be resampled; their rates stand beside.
            mean, base = (
                WordErrors.joined([run[what] for run in each]).by_voice(voices)
                for each in (runs, found[BASE])
            )
            low, high = mean.interval(rng)
            row[f"WER, {seeds}, {what}"] = round(mean.rate, 4)
            row[f"each seed, {what}"] = " ".join(f"{run[what].rate:.4f}" for run in runs)
            row[f"95 % of the {seeds}, {resampled}, {what}"] = f"{low:.4f} to {high:.4f}"
            if arm != BASE:
                between = mean.difference(base, rng)
                name = f"95 % of the {seeds} minus the base's, {resampled}, {what}"
                row[name] = f"{between.low:+.4f} to {between.high:+.4f}"
        row["parameters"] = sum(p.numel() for p in fresh(options, arm).model.parameters())
        rows.append(row)
    record.write("asr", (), {"word errors": rows} | conditions(options, "word errors"))
    source = planned(options, BASE, 0).data.source
    told = f"On {source} in noise, by unknown voices, from scratch."
    for arm, key in ERRORS.items():
        ratios = [
            run["noisy"].rate / max(base["noisy"].rate, 1e-9)
            for run, base in zip(found[arm], found[BASE], strict=True)
        ]
        note = f"{told} Without the paper's sinusoids." if arm == MEAN else told
        record.write(arm, [seeded.claim(arm, key, ratios, options.seeds, note)])


# A step of training -----------------------------------------------------------------------------


class Size(NamedTuple):
    """Of a batch: how many utterances, and how many seconds each lasts."""

    batch: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.batch} x {self.seconds:g} s"


def step_of(options: argparse.Namespace, arm: str, size: Size) -> speech_costs.Step:
    """A step of training on random sound."""
    torch.manual_seed(0)
    recogniser = fresh(options, arm)
    samples = round(size.seconds * recogniser.rate)
    batch = recogniser.inputs([0.1 * torch.randn(samples) for _ in range(size.batch)])
    labels = torch.randint(1, 20, (size.batch, round(8 * size.seconds)))
    batch |= {"labels": labels, "label_lengths": torch.full((size.batch,), labels.shape[1])}
    settings = planned(options, arm, 0).stages[0].training
    return speech_costs.Step(recogniser.model, CTC(), batch, settings)


def step_memory(options: argparse.Namespace, arm: str, size: Size) -> int:
    """Bytes of one step at its peak."""
    return peak_memory(step_of(options, arm, size))


def usual(options: argparse.Namespace) -> tuple[Size, int]:
    """The recipe's batch, its utterances of mean length, and the steps of an epoch."""
    plan = planned(options, BASE, 0)
    said = utterances(plan.data.source, plan.data.split, plan.data.utterances, plan.data.on_bad)
    batch = plan.stages[0].training.batch_size
    # On either side half the greatest silence, on average.
    seconds = statistics.mean(said.lengths) / RATE + TranscriptData.silence
    return Size(batch, round(seconds, 1)), len(said) // batch


def timed(options: argparse.Namespace, size: Size) -> Timings:
    calls = {arm: step_of(options, arm, size) for arm in TIMED}
    return interleave(calls, options.rounds, 2, BASE)


def steps(options: argparse.Namespace) -> None:
    """Time steps of all arms in turn, of the recipe's size and longer, and their memory alone."""
    size, epoch = usual(options)
    timings = timed(options, size)
    short = speech_costs.rows_of(timings)
    for row, timing in zip(short, timings.values(), strict=True):
        row |= {"utterances": str(size), "steps of an epoch": epoch}
        row["s per epoch"] = float(f"{epoch * timing.median:.3g}")
    size_long = Size(options.batch, options.seconds)
    memory = {arm: speech_costs.alone(step_memory, options, arm, size_long) for arm in TIMED}
    timings = timed(options, size_long)
    tables = {
        "a training step as in the recipe": short,
        f"a training step on {size_long}": speech_costs.rows_of(timings, memory),
    }
    record.write("asr", (), tables | conditions(options, "training steps"))
    told = " ".join([f"A step on {size_long}.", *timings.verdict.notes])
    figures = {
        (ROPE, "training-time"): (timings[ROPE].ratio, told),
        (ROPE, "parameters"): (spared_parameters() / 1e6, "Counted."),
        (MEAN, "training-time"): (timings[MEAN].ratio, told),
        (MEAN, "training-memory"): (memory[BASE] / memory[MEAN], told),
    }
    for (slug, key), (one, note) in figures.items():
        record.write(slug, [record.claim(slug, key, one, None, [0], note)])


def spared_parameters() -> int:
    """Parameters of the default Conformer that rotary positions do without."""
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

    with torch.device("meta"):
        model = Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig())
    before = sum(p.numel() for p in model.parameters())
    pared.convert(model, pared.parse("rope-asr"))
    return before - sum(p.numel() for p in model.parameters())


# Length -----------------------------------------------------------------------------------------


def heard_at(options: argparse.Namespace, arm: str, seconds: float) -> speech_costs.Point | None:
    """What scoring one utterance takes."""
    recogniser = fresh(options, arm)
    sound = 0.1 * torch.randn(round(seconds * recogniser.rate))
    recogniser.scores(sound[: recogniser.rate])  # libraries prepare themselves at first use
    return speech_costs.point_of(lambda: recogniser.scores(sound), seconds)


def lengths(options: argparse.Namespace) -> None:
    """Time and memory against the length of an utterance, each in a process of its own."""
    tables, figures = speech_costs.by_length(heard_at, options, TIMED, "an utterance", "its length")
    record.write("asr", (), tables | conditions(options, "lengths"), figures)


# All --------------------------------------------------------------------------------------------


SAME = (
    "seeds, utterances and their order, optimiser and steps, dropout of attention maps or of what "
    "is merged, convolutions that leave padding out"
)
POSITIONS = "relative; rotary; none; sinusoids added once"


def conditions(options: argparse.Namespace, what: str) -> dict[str, list[dict[str, str]]]:
    """A table of how one part was measured; parts may be measured apart."""
    precision = planned(options, BASE, 0).stages[0].training.precision
    told = {"recipe": os.path.relpath(options.recipe, record.ROOT)}
    told |= {
        "word errors": {"the same in all arms": SAME, "positions": POSITIONS},
        "training steps": {"precision": {"no": "float32"}.get(precision, precision)},
        "lengths": {"memory that an utterance may take": f"{options.gigabytes} GiB"},
    }[what]
    return {f"conditions of {what}": record.conditions(told)}


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
    speech_costs.add_options(parser, [10, 30, 60, 90, 120, 180, 300, 600], floor=60)
    options = parser.parse_args()
    for part in ["errors"] if options.only else options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
