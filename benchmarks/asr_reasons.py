"""Why SummaryMixing makes more errors here than attention: one thing changed at a time.

    python benchmarks/asr_reasons.py             # two hours on a core, from one seed
    python benchmarks/asr_reasons.py --only wide-relative

Each variant is trained as the arms of benchmarks/asr.py are, whose table has the same seed
unchanged. The attention maps of the one with relative positions are compared with what a mean does,
which is the same for all frames and weighs all alike. A run that was stopped goes on where it was.
Writes results/summarymixing-asr.json.
"""

import argparse
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import asr
import record
import seeded
import torch
from maps import unlike_a_mean
from recognised import sounds_of
from torch import Tensor

from pared import recipe
from pared.speech.recognition import Recogniser
from pared.worlds.readers.speech import Corpus
from pared.worlds.speech import Speech

ERRORS, MAPS = "what makes for errors", "attention maps of the widened base"
WIDE = 31  # frames of a convolution, the paper's
REACH = 12  # frames on either side, a quarter of a second


class Variant(NamedTuple):
    """What is trained instead of an arm of the main table.

    Attributes:
        told: what is changed, for the table.
        over: the arm that it changes.
        settings: of the arm's method, after its own.
        config: entries of the model's configuration, over the recipe's.
    """

    told: str
    over: str
    settings: str = ""
    config: Mapping[str, Any] = MappingProxyType({})


CONVOLUTIONS = {"conv_depthwise_kernel_size": WIDE}
VARIANTS = {
    "wide-relative": Variant(f"convolutions of {WIDE} frames", asr.BASE, config=CONVOLUTIONS),
    "wide-mean": Variant(f"convolutions of {WIDE} frames", asr.MEAN, config=CONVOLUTIONS),
    "unplaced": Variant("no positions", asr.BASE, config={"position_embeddings_type": ""}),
    "near": Variant(f"a mean over {2 * REACH + 1} frames", asr.MEAN, f",window={REACH}"),
    "early": Variant("in the first half of the blocks alone", asr.MEAN, ",layers=[0,1]"),
}
# Whose maps are looked at.
MAPPED = "wide-relative"


def planned(options: argparse.Namespace, name: str) -> recipe.Recipe:
    """The recipe of a variant."""
    variant = VARIANTS[name]
    plan = asr.planned(options, variant.over, options.seed)
    methods = tuple(f"{spec}{variant.settings}" for spec in plan.model.methods)
    config = plan.model.config | dict(variant.config)
    return seeded.planned(plan, options.seed, methods=methods, config=config)


def trained(options: argparse.Namespace, name: str) -> tuple[Recogniser, float]:
    """A variant's recogniser, and its mean loss over the last tenth of the steps."""
    plan = planned(options, name)
    folder = asr.place_of(options, name, plan)
    recogniser = asr.trained(plan, folder)
    lines = [json.loads(x) for x in (folder / "stage-1" / "log.jsonl").read_text().splitlines()]
    late = 0.9 * plan.stages[0].training.steps
    return recogniser, statistics.mean(line["ctc"] for line in lines if line["step"] > late)


def errors(
    options: argparse.Namespace, said: Speech | Corpus, recognisers: dict
) -> list[dict[str, Any]]:
    """A row for each variant: what it is, how well it learnt, and what it hears wrong."""
    rows = []
    for name, (recogniser, loss) in recognisers.items():
        found = asr.misheard(recogniser, said, planned(options, name), name)
        rows.append(
            {
                "attention": VARIANTS[name].over,
                "changed": VARIANTS[name].told,
                "CTC loss, last tenth of the steps": round(loss, 3),
            }
            | {f"WER, {what}": round(each.rate, 4) for what, each in found.items()}
        )
    return rows


@torch.no_grad()
def maps_of(recogniser: Recogniser, sounds: list[Tensor]) -> list[dict[str, Any]]:
    """A row for each block: how far its attention maps are from a mean's, over sounds and heads.

    Args:
        recogniser: whose attentions form maps.
        sounds: (samples,) each.
    """
    recogniser.model.set_attn_implementation("eager")
    found = []
    for sound in sounds:
        batch = recogniser.inputs([sound])
        batch.pop("input_lengths")
        maps = recogniser.model(**batch, output_attentions=True).attentions
        found.append(torch.stack([marks_of(each[0]) for each in maps]))
    of_blocks = torch.stack(found).mean(dim=0)  # (blocks, heads, figures)
    return [
        {
            "block": number,
            "frames attended to, share": round(float(heads[:, 0].mean()), 3),
            "that differs between frames, share": round(float(heads[:, 1].mean()), 3),
            "within 3 frames, share": round(float(heads[:, 2].mean()), 3),
            "within 3 frames, share, of the most local head": round(float(heads[:, 2].max()), 3),
        }
        for number, heads in enumerate(of_blocks)
    ]


def marks_of(maps: Tensor) -> Tensor:
    """Of each head: how its maps differ from a mean's, and the share that lies within 3 frames.

    Args:
        maps: (heads, frames, frames); rows sum to 1.

    Returns:
        (heads, 3).
    """
    frames = torch.arange(maps.shape[-1])
    near = maps * ((frames[:, None] - frames).abs() <= 3)
    return torch.cat([unlike_a_mean(maps), near.sum(dim=-1).mean(dim=-1, keepdim=True)], dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="train these, count nothing")
    parser.add_argument("--recipe", type=Path, default=asr.RECIPE)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/asr-reasons"), help="of the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--utterances", type=int, help="held-out ones that are heard; all")
    options = parser.parse_args()
    recognisers = {name: trained(options, name) for name in options.only or VARIANTS}
    if options.only:
        return
    said = asr.heldout(options)
    rows = errors(options, said, recognisers)
    recogniser, _ = recognisers[MAPPED]
    maps = maps_of(recogniser, sounds_of(said, planned(options, MAPPED).data.snr)[:100])
    told = {
        "recipe": os.path.relpath(options.recipe, record.ROOT),
        "the same in all": asr.SAME,
        "seed": str(options.seed),
    }
    conditions = {f"conditions of {ERRORS}": record.conditions(told)}
    record.write(asr.MEAN, (), {ERRORS: rows, MAPS: maps} | conditions)


if __name__ == "__main__":
    main()
