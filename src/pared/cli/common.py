"""What the commands share: options, method specs, plain tables, outputs refused in time."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from pared import info
from pared.errors import InputError

if TYPE_CHECKING:
    from pared.info import Info
    from pared.method import Conversion, RuntimeMethod

# What click's decorators wrap.
Command = Callable[..., Any]

DTYPES = ("float32", "bfloat16", "float16")

# What a method of another kind is told to go to.
RIGHT_PLACE = {
    "conversion": "rebuilds a model; use `pared convert`",
    "runtime": "works while a pipeline runs; use `pared sample` or `pared bench`",
    "objective": "is a way of training; name it in a recipe and use `pared train`",
    "model": "is a model of its own and changes no other one; `pared methods` lists those that do",
}


# Options --------------------------------------------------------------------------------------


class MethodName(click.ParamType):
    """A method's slug, completed from the registry."""

    name = "method"

    def __init__(self, kind: str | None = None) -> None:
        self.kind = kind

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [
            CompletionItem(record.slug, help=record.summary)
            for record in info.registry().values()
            if record.slug.startswith(incomplete) and self.kind in (None, record.kind)
        ]


def with_option(kind: str, required: bool = False) -> Callable[[Command], Command]:
    """`--with SPEC`, repeatable; completes the methods of one kind."""
    examples = {
        "conversion": "A method, e.g. edit or edit:r=8,key=none; repeat to combine several.",
        "runtime": "A run-time method (`pared methods --kind runtime`); repeat to combine several.",
    }
    return click.option(
        "--with",
        "specs",
        multiple=True,
        required=required,
        metavar="SPEC",
        type=MethodName(kind),
        help=examples[kind],
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
dtype_option = click.option(
    "--dtype", type=click.Choice(DTYPES), help="Type of the weights; by default as saved."
)
device_option = click.option(
    "--device",
    metavar="DEVICE",
    help="cpu, cuda, cuda:1, mps ...; by default the accelerator if there is one.",
)


# Reading what was given -----------------------------------------------------------------------


def records_of(specs: Sequence[str], kind: str) -> list[Info]:
    """The records of the methods in `specs`; needs no torch.

    Raises:
        InputError: unknown method, or one of another kind; the message says where it belongs.
    """
    records = [info.get(spec.partition(":")[0].strip()) for spec in specs]
    for record in records:
        if record.kind != kind:
            raise InputError(f"{record.slug} {RIGHT_PLACE[record.kind]}.")
    return records


def conversions_of(specs: Sequence[str]) -> list[Conversion]:
    """The conversions in `specs`, with their settings validated. Imports torch."""
    records_of(specs, "conversion")
    from pared.method import parse

    return [cast("Conversion", parse(spec)) for spec in specs]


def runtime_methods_of(specs: Sequence[str]) -> list[RuntimeMethod]:
    """The run-time methods in `specs`, with their settings validated. Imports torch."""
    records_of(specs, "runtime")
    from pared.method import parse

    return [cast("RuntimeMethod", parse(spec)) for spec in specs]


def dtype_of(name: str | None) -> Any:
    """The torch type of a `--dtype`, or None."""
    import torch

    return None if name is None else getattr(torch, name)


def device_of(name: str | None) -> Any:
    """The torch device of a `--device`; by default the accelerator if there is one.

    Raises:
        InputError: no such device here.
    """
    import torch

    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if name is None:
        return accelerator or torch.device("cpu")
    here = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    count = torch.accelerator.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if (
        device is None
        or device.type not in here
        or (device.type != "cpu" and (device.index or 0) >= count)
    ):
        raise InputError(
            f"there is no device {name!r} here; torch sees {' and '.join(sorted(here))}."
        )
    return device


def check_writable(path: Path) -> None:
    """Refuse an output whose place can't be written, before any work.

    Raises:
        InputError: the nearest folder above that exists isn't a folder, or is read-only.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if place != path.absolute() and not place.is_dir():
        raise InputError(f"{path} can't be written: {place} is a file; choose another place.")
    if not os.access(place, os.W_OK):
        raise InputError(f"{path} can't be written: {place} is read-only; choose another place.")


def check_file(path: Path, example: str) -> None:
    """The same for an output that is one file, and would have a name like `example`."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file, e.g. {example}.")
    check_writable(path)


# Printing -------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """One JSON document on the standard output."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of text, aligned; nothing is cut, so that the output can be searched."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def count(number: int) -> str:
    """A number of parameters, to three digits: 54.4 K, 611 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def stopped(ctx: click.Context) -> NoReturn:
    """End an interrupted run: say how to go on, with all that was given, exit code 130."""
    words = [str(ctx.info_name)]
    for each in ctx.command.params:
        name = str(each.name)
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if isinstance(each, click.Argument):
            words.append(str(value))
        elif cast(click.Option, each).is_flag:
            words.append(each.opts[0])
        else:
            for one in value if each.multiple else [value]:
                words += [each.opts[0], str(one)]
    click.echo(f"pared: stopped; go on with: pared {shlex.join(words)}", err=True)
    ctx.exit(130)
