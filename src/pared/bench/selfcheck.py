"""A method's own quick checks, run before any speed-up of it is printed.

They stand beside the method, in a file named `<its file>_checks.py`: functions `check_*` without
arguments that raise when something is wrong, each done in a second.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from diffusers.utils import logging

from pared.method import Method


def checks_of(module: str) -> list[Callable[[], None]]:
    """The checks that stand beside a method's module, in their order; none if there's no file."""
    name = f"{module}_checks"
    if importlib.util.find_spec(name) is None:
        return []
    found = vars(importlib.import_module(name))
    return [value for key, value in found.items() if key.startswith("check_")]


def failures(method: Method) -> list[str]:
    """Runs a method's quick checks.

    Returns:
        A sentence for each check that fails; empty if all pass, or if the method has none.
    """
    found = []
    for check in checks_of(type(method).__module__):
        try:
            with _quiet():
                check()
        # Whatever goes wrong in a check is its result.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            found.append(f"{method.info.slug}: {check.__name__} fails ({reason.rstrip('.')}).")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' remarks on the toy models of the checks."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def failures_of(methods: Iterable[Method]) -> list[str]:
    """The failures of several methods, each class checked once."""
    classes = {type(method): method for method in methods}
    return [failure for method in classes.values() for failure in failures(method)]
