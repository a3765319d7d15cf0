"""Why attention to the enrolment gains nothing here over its mean: one thing changed at a time.

    python benchmarks/enhancement_reasons.py                 # an hour and a half on two cores
    python benchmarks/enhancement_reasons.py --only moods --arms cross

Both are trained as benchmarks/enhancement.py trains them, but in float32, which is quicker on
CPUs; once as there, once for longer, once with long enrolments in which nobody says two sentences
at the same pitch, and once with an encoder that hears a single frame at a time. What the attention
makes of an enrolment is compared with what a mean does, and it is judged once more where each frame
is told what all frames of the clip are told on average. A training that was stopped goes on where
it was. Writes results/streaming-pse.json.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import enhancement
import record
import torch
from enhancement_marks import Figures
from enhancement_sets import kept
from maps import unlike_a_mean
from torch import Tensor, nn

from pared import recipe
from pared.speech.streaming_pse.model import StreamingPSEModel

GAINS, MAPS = "what attention to the enrolment gains over its mean", "attention to the enrolment"
ATTENTION, MEAN = "cross", "static_mean"
ARMS = (MEAN, ATTENTION)
IMPROVEMENT = "SI-SDRi, dB"
EXACT = "stages.0.training.precision=no"


class Variant(NamedTuple):
    """What is trained.

    Attributes:
        told: what is changed, for the table.
        changes: of the recipe.
    """

    told: str
    changes: tuple[str, ...] = ()


VARIANTS = {
    "same": Variant("nothing"),
    "longer": Variant("three times the steps", ("stages.0.training.steps=6000",)),
    "moods": Variant(
        "enrolments of 6 to 10 s, each sentence at a pitch of its own",
        (
            "data.mixing.enrolment_seconds=[6.0, 10.0]",
            "data.mixing.mood=[0.8, 1.25]",
            "model.config.enrolment_seconds=10.0",
        ),
    ),
    "frames": Variant(
        "frames of the enrolment encoded each by itself",
        ("model.config.enrolment_encoder=frames",),
    ),
}


def bench_of(options: argparse.Namespace, name: str) -> enhancement.Bench:
    """What trains and judges a variant."""
    plan = recipe.read(options.recipe, [EXACT, *VARIANTS[name].changes, *options.set])
    told = vars(options) | {"plan": plan, "recogniser": None, "measures": ()}
    return enhancement.Bench(argparse.Namespace(**told))


def gains_of(bench: enhancement.Bench, seeds: Sequence[int]) -> dict[str, Any]:
    """A row: how much each improves, means over seeds, and by how much attention improves more."""
    marks = {arm: [bench.done(arm, seed) for seed in seeds] for arm in ARMS}
    flat = [told_the_same(bench, seed) for seed in seeds]

    def over(one: list[Figures], other: list[Figures]) -> float:
        return mean(a[IMPROVEMENT] - b[IMPROVEMENT] for a, b in zip(one, other, strict=True))

    found = {f"{arm}, {IMPROVEMENT}": mean(m[IMPROVEMENT] for m in marks[arm]) for arm in ARMS}
    found["attention over mean, dB"] = over(marks[ATTENTION], marks[MEAN])
    found["lost where all frames are told the same, dB"] = over(marks[ATTENTION], flat)
    found |= {f"{arm}, flips": mean(m["flips"] for m in marks[arm]) for arm in ARMS}
    return {key: round(value, 3) + 0.0 for key, value in found.items()}  # no -0.0


@torch.no_grad()
def told_the_same(bench: enhancement.Bench, seed: int) -> Figures:
    """Marks of the attention's model on the clips where all frames of a clip are told the same."""
    model = bench.trained(ATTENTION, seed)
    with constant(model):
        return bench.judge.of_clips(
            [kept(model, one.mixture, one.enrolment) for one in bench.judge.clips]
        )


@contextmanager
def constant(model: StreamingPSEModel) -> Iterator[None]:
    """Within the context all frames of a clip are told S's mean over the clip."""

    def averaged(module: nn.Module, given: Any, told: Tensor) -> Tensor:
        return told.mean(dim=1, keepdim=True).expand_as(told)

    hooks = [layer.cross.register_forward_hook(averaged) for layer in model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def maps_of(model: StreamingPSEModel, clips: Sequence[Any]) -> list[Tensor]:
    """Of each layer, means over clips: see `unlike_a_mean`, (layers, heads, 2)."""
    found: list[list[Tensor]] = [[] for _ in model.layers]

    def note(number: int) -> Callable[..., None]:
        def noted(cross: nn.Module, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
            h, key, _, valid = given
            query = cross.to_q(cross.norm(h)).unflatten(-1, (cross.heads, -1)).transpose(1, 2)
            heard = key[0][:, valid[0]]  # (heads, frames that count, channels)
            scores = query[0] @ heard.mT / heard.shape[-1] ** 0.5
            found[number].append(unlike_a_mean(scores.softmax(dim=-1)))

        return noted

    hooks = [
        layer.cross.register_forward_pre_hook(note(number))
        for number, layer in enumerate(model.layers)
    ]
    for clip in clips:
        kept(model, clip.mixture, clip.enrolment)
    for hook in hooks:
        hook.remove()
    return [torch.stack(each).mean(dim=0) for each in found]


def map_rows(options: argparse.Namespace, benches: dict[str, enhancement.Bench]) -> list[Any]:
    """A row for each variant and layer, from the first seed."""
    rows = []
    for name, bench in benches.items():
        model = bench.trained(ATTENTION, options.seeds[0])
        for number, heads in enumerate(maps_of(model, bench.judge.clips)):
            rows.append(
                {
                    "changed": VARIANTS[name].told,
                    "layer": number,
                    "frames attended to, share": round(float(heads[:, 0].mean()), 3),
                    "that differs between frames, share": round(float(heads[:, 1].mean()), 3),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="train these, write nothing")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="with --only")
    parser.add_argument("--recipe", type=Path, default=enhancement.RECIPE)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/enhancement-reasons"), help="of the runs"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--clips", type=int, default=240, help="that are judged")
    parser.add_argument("--pairs", type=int, default=120, help="of talkers that are judged")
    options = parser.parse_args()
    benches = {name: bench_of(options, name) for name in options.only or VARIANTS}
    if options.only:
        for bench in benches.values():
            for arm in options.arms:
                for seed in options.seeds:
                    print(arm, seed, bench.done(arm, seed), flush=True)
        return
    rows = [
        {"changed": VARIANTS[name].told, **gains_of(bench, options.seeds)}
        for name, bench in benches.items()
    ]
    told = {
        "recipe": os.path.relpath(options.recipe, record.ROOT),
        "the same in all": "float32",
        "seeds": ", ".join(map(str, options.seeds)),
    }
    tables = {GAINS: rows, MAPS: map_rows(options, benches)}
    tables[f"conditions of {GAINS}"] = record.conditions(told)
    record.write(enhancement.SLUG, (), tables)


if __name__ == "__main__":
    main()
