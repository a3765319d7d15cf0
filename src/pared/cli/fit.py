"""`pared fit`: the best way to run a model under a budget of time or quality."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pared.cli import common
from pared.cli.models import ModelName, locate
from pared.cli.sample import OPTIONS, arguments_of
from pared.errors import InputError

if TYPE_CHECKING:
    from pared.bench.fit import Fit, Trial

# Candidates that are printed.
SHOWN = 12


class Quantity(click.ParamType):
    """A number with its unit, which may be left out."""

    def __init__(self, unit: str) -> None:
        self.unit = self.name = unit

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        text = str(value).strip().removesuffix(self.unit).strip()
        try:
            number = float(text)
        except ValueError:
            number = -1
        if not 0 < number < float("inf"):
            self.fail(f"{value!r} is no amount in {self.unit}; write e.g. 3{self.unit}.")
        return number


@click.command()
@click.argument("model", type=ModelName())
@click.option("--latency", type=Quantity("s"), help="Time of a picture, at most, e.g. 3s.")
@click.option(
    "--quality",
    type=Quantity("dB"),
    help="PSNR to the whole model's pictures, at least, e.g. 35dB.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="METHOD",
    type=common.MethodName("runtime"),
    help="Choose among these; by default all run-time methods that serve the model. Repeatable.",
)
@click.option("--prompt", "prompts", multiple=True, help="What to paint; repeat for more.")
@click.option("--steps", type=click.IntRange(2), help="Denoising steps; by default the pipeline's.")
@click.option(
    "--guidance", type=click.FloatRange(0), help="Guidance scale; by default the pipeline's."
)
@click.option("--height", type=click.IntRange(1), help="In pixels; by default the model's own.")
@click.option("--width", type=click.IntRange(1), help="In pixels; by default the model's own.")
@click.option(
    "--pictures",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Painted with each finalist.",
)
@click.option("--no-pairs", is_flag=True, help="Try no two methods together.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Plan to write (JSON)."
)
@common.json_option
@common.device_option
@common.dtype_option
def command(
    model: str,
    latency: float | None,
    quality: float | None,
    prompts: tuple[str, ...],
    no_pairs: bool,
    output: Path,
    as_json: bool,
    device: str | None,
    dtype: str | None,
    **options: Any,
) -> None:
    """Find the best way to run a model under a budget.

    Run-time methods and pairs of them, in the settings that their records name, compete with each
    other and with fewer steps. Every picture is painted by all that are left in turn; after each
    round the worse half goes. With --latency the way nearest to the whole model wins, with
    --quality the fastest. The plan holds the methods and all that they were measured with: model,
    sampler, type, steps, guidance and size; `pared sample --plan` runs it. Ctrl-C keeps what was
    found.

    \b
    Examples:
      pared fit house:pixart --quality 30dB -o plan.json
      pared fit house:unet --latency 0.5s --steps 20 --method deepcache -o plan.json
    """
    if (latency is None) == (quality is None):
        raise InputError("give --latency, e.g. 3s, or --quality, e.g. 35dB: one of the two.")
    common.records_of(options["methods"], "runtime")
    common.check_file(output, "plan.json")
    source = locate(model)
    source.require_pipeline("painting")
    where = common.device_of(device)
    call = arguments_of(source.folder(), model, {name: options.pop(name) for name in OPTIONS})
    pipeline = source.load(common.dtype_of(dtype), where)

    from pared.bench.fit import fit

    progress = Progress()
    found = fit(
        pipeline,
        latency,
        quality,
        prompts=prompts or None,
        pairs=not no_pairs,
        on_round=progress.round,
        on_picture=progress.picture,
        name=model,
        **options,
        **call,
    )
    progress.close()
    found.save(output)
    if as_json:
        common.print_json(found.to_dict())
        return
    _print(found, model, output)


class Progress:
    """A bar for each round, on the error stream."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.rounds = 0

    def round(self, alive: list[Trial], pictures: int) -> None:
        from huggingface_hub.utils import tqdm

        self.close()
        self.rounds += 1
        total = (len(alive) + 1) * pictures
        self.bar = tqdm(total=total, desc=f"round {self.rounds}: {len(alive)} candidates")

    def picture(self, done: int, total: int) -> None:
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _print(found: Fit, model: str, output: Path) -> None:
    shown = [found.best, *(t for t in (*found.trials, found.base) if t is not found.best)][:SHOWN]
    rows = [
        [
            "+".join(trial.stack) or "fewer steps" * (trial is not found.base) or "whole",
            str(trial.steps),
            str(len(trial.seconds)),
            f"{trial.time:.3g}",
            f"{found.base.time / trial.time:.2f}x",
            f"{trial.quality:.1f}",
        ]
        for trial in shown
    ]
    common.print_table(["way", "steps", "pictures", "seconds", "faster", "PSNR dB"], rows)
    if not found.complete:
        click.echo("Stopped by Ctrl-C: this is the best of what was measured until then.")
    use = ["pared", "sample", model, "PROMPT", "--plan", str(output), "-o", "picture.png"]
    click.echo(f"{output}: use it by: {shlex.join(use)}")
