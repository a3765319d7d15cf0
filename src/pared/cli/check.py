"""`pared check`: the quick checks of methods, and what every method must do, on toy models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import click

from pared import info
from pared.anatomy import presets
from pared.cli import common
from pared.info import Info


@dataclass(frozen=True)
class Check:
    """One check: what it says, and how it's run."""

    method: str
    family: str
    name: str
    text: str
    run: Callable[[], None]


@dataclass(frozen=True)
class Result:
    """What came of a check; `message` says what was wrong."""

    method: str
    family: str
    name: str
    text: str
    passed: bool
    seconds: float
    message: str


@click.command()
@click.argument("methods", nargs=-1, metavar="[METHOD]...", type=common.MethodName())
@common.json_option
@click.pass_context
def command(ctx: click.Context, methods: tuple[str, ...], as_json: bool) -> None:
    """Run the quick checks of methods on toy models.

    First the checks of a method's own paper: what its mathematics promises without any trained
    weights. Then what every method must do on every model family that it serves: keep the weights,
    save and load, treat a batch like single samples, train, compile. Without METHOD: all of them.
    The exit code is 1 if a check fails.

    \b
    Examples:
      pared check edit
      pared check --json
    """
    records = [info.get(slug) for slug in methods] or list(info.registry().values())
    _warm_up()
    results = []
    for record in records:
        if not as_json:
            click.echo(record.slug)
        for check in _checks(record):
            results.append(result := _run(check))
            if not as_json:
                _print(result)
    failed = sum(not result.passed for result in results)
    if as_json:
        common.print_json([asdict(result) for result in results])
    else:
        click.echo(f"{len(results)} checks, {failed or 'none'} failed")
    if failed:
        ctx.exit(1)


def _warm_up() -> None:
    """Import and silence the libraries first: the times are to be those of the checks."""
    from diffusers.utils import logging

    from pared.bench import contract

    logging.set_verbosity_error()
    for family in contract.toy_families():
        presets.build(f"toy:{family}")


def _checks(record: Info) -> Iterator[Check]:
    """A method's own checks, then the contract's."""
    from pared.bench import contract, selfcheck

    for own in selfcheck.checks_of(record.module):
        yield Check(record.slug, "", own.__name__, _first_line(own), own)
    method = record.load()()
    for family, shared in contract.cases(record):
        run = partial(shared, method, family)
        yield Check(record.slug, family, shared.__name__, _first_line(shared), run)


def _first_line(function: Callable[..., None]) -> str:
    return (function.__doc__ or function.__name__).strip().partition("\n")[0]


def _run(check: Check) -> Result:
    start = time.perf_counter()
    message = ""
    try:
        check.run()
    # Whatever goes wrong in a check is its result; the others still run.
    except Exception as error:
        message = str(error).strip() or "it failed without a message"
        if not isinstance(error, AssertionError):
            message = f"{type(error).__name__}: {message}"
    seconds = time.perf_counter() - start
    return Result(
        check.method, check.family, check.name, check.text, not message, round(seconds, 3), message
    )


def _print(result: Result) -> None:
    mark = "ok  " if result.passed else "FAIL"
    where = f"{result.family}: " if result.family else ""
    click.echo(f"  {mark} {result.seconds:6.2f} s  {where}{result.text}")
    if not result.passed:
        click.echo("".join(f"       {line}\n" for line in result.message.splitlines()), nl=False)
