"""`pared search`: the steps at which a model may reuse what it computed before."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pared.cli import common
from pared.cli.models import ModelName, locate
from pared.cli.sample import arguments_of, classes_of, painted_by
from pared.errors import InputError

if TYPE_CHECKING:
    from pared.caching.runs import Runs
    from pared.caching.schedules import Bits, Log, ReuseSchedule, Way
    from pared.method import RuntimeMethod

# Of the noise: far from those that benches and samples begin with.
FIRST_SEED = 1000
# Of a reusing step, in steps, for the rival with fewer steps: as the first figure of arXiv
# 2401.01008 pairs them. It is more where kernels never form the map.
REUSE_COST = 0.3


@click.command()
@click.argument("model", type=ModelName())
@click.option(
    "--method",
    "spec",
    metavar="SPEC",
    type=common.MethodName("runtime"),
    default="attention-map-reuse",
    show_default=True,
    help="What reuses, e.g. attention-map-reuse:sites=self.",
)
@click.option(
    "--steps", type=click.IntRange(2), default=20, show_default=True, help="Denoising steps."
)
@click.option("--count", type=click.IntRange(1), required=True, help="Steps that reuse.")
@click.option(
    "--way",
    type=click.Choice(["swaps", "adjacent", "greedy", "exhaustive"]),
    default="swaps",
    show_default=True,
    help="Swap a reusing and a computing step while that helps (PHAST), neighbouring steps alone, "
    "add the least harmful step again and again, or try everything.",
)
@click.option(
    "--prompts",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="To paint: captions of the emoji world, or classes where the model takes these.",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Pictures of each."
)
@click.option(
    "--latents", is_flag=True, help="Compare final latents, and not pictures: saves decoding."
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Pictures at once."
)
@click.option(
    "--guidance", type=click.FloatRange(0), help="Guidance scale; by default the pipeline's."
)
@click.option("--height", type=click.IntRange(8), help="In pixels; by default the model's own.")
@click.option("--width", type=click.IntRange(8), help="In pixels; by default the model's own.")
@click.option(
    "-o",
    "--out",
    "--output",
    "output",
    type=click.Path(path_type=Path),
    required=True,
    help="Schedule to write (JSON).",
)
@click.option(
    "--curve",
    type=click.Path(path_type=Path),
    help="Also write a page (HTML) with the curves of single steps: what reuse at each alone does "
    "to the end, and how any small error made there grows.",
)
@common.json_option
@common.device_option
@common.dtype_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    spec: str,
    steps: int,
    count: int,
    way: Way,
    prompts: int,
    seeds: int,
    latents: bool,
    batch_size: int,
    output: Path,
    curve: Path | None,
    as_json: bool,
    device: str | None,
    dtype: str | None,
    **size: Any,
) -> None:
    """Find the steps at which reuse harms least.

    Paints the same prompts from the same noise under one schedule after the other, and compares
    each with the full run by PSNR. The schedule holds for this model, sampler and number of steps,
    and for every prompt, or class where the model paints these. Ctrl-C keeps the best schedule
    until then; what was scored lies beside the output, in OUT.log, and the same command goes on
    from there.

    \b
    Examples:
      pared search house:unet --steps 20 --count 10 --out schedule.json --curve curve.html
      pared search house:pixart --method attention-map-reuse:sites=self --steps 10 --count 3
        --way exhaustive --prompts 4 --latents --out schedule.json
    """
    common.records_of([spec], "runtime")
    _check_count(count, steps)
    source = locate(model)
    source.require_pipeline("searching")
    common.check_file(output, "schedule.json")
    if curve is not None:
        common.check_file(curve, "curve.html")
    where = common.device_of(device)
    method = _scheduled(spec)
    call = arguments_of(source.folder(), model, size)
    painted = painted_by(source.folder(), model)
    if latents and painted != "prompt":
        raise InputError(f"{model} gives pictures alone; leave --latents out.")

    from pared.caching.runs import Runs
    from pared.caching.schedules import Log, search
    from pared.guidance.guidance_distillation import one_pass

    wanted = _captions(prompts) if painted == "prompt" else _classes(prompts, source.folder())
    call[painted] = wanted
    plain = {name: value for name, value in call.items() if name != painted}
    about: dict[str, Any] = {"model": model, "method": method.spec(), "steps": steps}
    about |= {"prompts": wanted, "seeds": seeds, "latents": latents, "dtype": dtype, "call": plain}
    log = Log(output.with_name(f"{output.name}.log"), about)
    pipeline = source.load(common.dtype_of(dtype), where)
    call = one_pass(pipeline, **call)
    noise = range(FIRST_SEED, FIRST_SEED + seeds)

    def running(ends_in_latents: bool) -> Runs:
        return Runs(pipeline, cast(Any, method), steps, noise, ends_in_latents, batch_size, **call)

    runs = running(latents)
    found = search(runs, runs.steps, count, way, log, model, type(pipeline.scheduler).__name__)
    found.save(output)
    if curve is not None and found.complete:
        nudged = None if painted != "prompt" else runs if latents else running(True)
        _draw(curve, f"{model}, {method.spec()}", runs, log, nudged)
    if as_json:
        common.print_json(found.to_dict())
    else:
        best = cast(Any, method).model_copy(update={"reuse": str(output)})
        use = ["pared", "sample", model, "PROMPT", "--steps", str(steps), "--with", best.spec()]
        _show(found, runs, steps, shlex.join(use))
    if not found.complete:
        common.stopped(ctx)


def _draw(curve: Path, title: str, runs: Runs, log: Log, nudged: Runs | None) -> None:
    """Write the page of single steps."""
    from pared.bench import single_steps

    single_steps.write(curve, title, Remembered(runs, log), runs.steps, nudged)


class Remembered:
    """Scores of which the log knows some."""

    def __init__(self, runs: Runs, log: Log) -> None:
        self.runs, self.log = runs, log

    def __call__(self, bits: Bits) -> float:
        if bits not in self.log.scores:
            self.log.add(bits, self.runs(bits))
        return self.log.scores[bits]


def _check_count(count: int, steps: int) -> None:
    if count >= steps:
        raise InputError(
            f"{count} of {steps} steps can't reuse: the first computes; give a --count from 1 to "
            f"{steps - 1}."
        )


def _scheduled(spec: str) -> RuntimeMethod:
    """The method, if it follows a schedule."""
    (method,) = common.runtime_methods_of([spec])
    if not hasattr(method, "under"):
        raise InputError(f"{method.info.slug} follows no schedule that could be searched for.")
    return method


def _captions(count: int) -> list[str]:
    """Captions from all over the emoji world, none that benches paint or that was held out.

    Raises:
        InputError: there aren't so many.
    """
    from pared.bench.subjects import PROMPTS
    from pared.worlds import emoji

    captions = [c for c in emoji.load(split="train", size=None).captions if c not in PROMPTS]
    if count > len(captions):
        raise InputError(f"there are {len(captions)} captions; give a smaller --prompts.")
    return [captions[number * len(captions) // count] for number in range(count)]


def _classes(count: int, folder: Path) -> list[int]:
    """Classes from all over those of a model, none that benches paint.

    Raises:
        InputError: there aren't so many.
    """
    from pared.bench.subjects import CLASSES

    classes = [number for number in range(classes_of(folder)) if number not in CLASSES]
    if count > len(classes):
        raise InputError(f"there are {len(classes)} classes; give a smaller --prompts.")
    return [classes[number * len(classes) // count] for number in range(count)]


def _show(found: ReuseSchedule, runs: Runs, steps: int, use: str) -> None:
    rows = [
        ["HURRY, the last steps reuse", f"{found.curve[0]:.2f}"],
        [f"found, {''.join(map(str, found.bits))}", f"{found.curve[-1]:.2f}"],
    ]
    if found.complete:
        fewer = max(1, round(steps * (1 - (1 - REUSE_COST) * found.count / found.steps)))
        rows.append([f"no reuse, {fewer} steps", f"{runs.fewer(fewer):.2f}"])
    common.print_table([f"{found.count} of {found.steps} steps reuse", "PSNR dB"], rows)
    click.echo(f"use it by: {use} -o picture.png")
