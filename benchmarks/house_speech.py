"""Measures the house models of speech: what the recogniser gets wrong, what the enhancer keeps.

    python benchmarks/house_speech.py              # ten minutes on two cores
    python benchmarks/house_speech.py --parts recogniser --utterances 50

All voices and all sentences are held out. Writes its tables into results/house.json.
"""

import argparse
from typing import Any

import record
import torch
from enhancement_marks import Judge
from enhancement_sets import kept
from recognised import errors_of, sounds_of

from pared import recipe
from pared.speech.recognition import load
from pared.speech.streaming_pse import model as enhancers
from pared.worlds.house import folder_of
from pared.worlds.speech.sources import utterances

RECOGNISER, ENHANCER = "house:conformer", "house:streaming-pse"
RECIPES = record.ROOT / "recipes" / "house"
KINDS = ("digits", "commands", "sentences")
# What is heard: signal to noise in dB from there to there, or no noise at all.
SOUNDS = {"without noise": None, "in noise, 15 dB": (15.0, 15.0), "in noise, 5 dB": (5.0, 5.0)}


def recogniser(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Word errors by what is said, with and without noise."""
    model, rng = load(folder_of(RECOGNISER)), torch.Generator().manual_seed(0)
    rows = []
    for kind in KINDS:
        said = utterances(f"speech:{kind}", "heldout", {kind: options.utterances})
        for name, snr in SOUNDS.items():
            errors = errors_of(model, said.transcripts, sounds_of(said, snr))
            # Of voices, not of utterances, of which each has many.
            low, high = errors.by_voice(said.speakers).interval(rng)
            rows.append(
                {
                    "said": kind,
                    "heard": name,
                    "utterances": len(said),
                    "WER": round(errors.rate, 4),
                    "95 %, voices resampled": f"{low:.4f} to {high:.4f}",
                }
            )
            print(rows[-1], flush=True)
    return {"The recogniser": rows}


def enhancer(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Marks on mixtures as it was trained on, and on two talkers equally loud."""
    model = enhancers.load(folder_of(ENHANCER))
    plan = recipe.read(RECIPES / "streaming-pse.toml")
    judge = Judge(plan, options.clips, options.pairs, RECOGNISER)
    rows = []
    for name, enhance in (
        ("unprocessed", lambda noisy, _: noisy),
        (ENHANCER, lambda noisy, enrolment: kept(model, noisy, enrolment)),
    ):
        marks = judge.marks(enhance)
        rows.append({"sound": name} | {key: round(value, 3) for key, value in marks.items()})
        print(rows[-1], flush=True)
    return {"The enhancer": rows}


PARTS = {"recogniser": recogniser, "enhancer": enhancer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--utterances", type=int, default=150, help="of each kind that are heard")
    parser.add_argument("--clips", type=int, default=240, help="mixtures that are judged")
    parser.add_argument("--pairs", type=int, default=120, help="of talkers that are judged")
    options = parser.parse_args()
    judged = f"{options.clips} mixtures as in training, {options.pairs} pairs of talkers"
    tables = {name: rows for part in options.parts for name, rows in PARTS[part](options).items()}
    tables["Conditions of speech"] = record.conditions({"judged": judged})
    print(record.write("house", (), tables))


if __name__ == "__main__":
    main()
