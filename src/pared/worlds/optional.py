"""Packages that only some installations have."""

import importlib
from types import ModuleType

from pared.errors import InputError


def need(module: str, extra: str = "data") -> ModuleType:
    """Import a module of an optional package, which an extra of pared brings.

    Raises:
        InputError: the package isn't installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"this needs the package {module.partition('.')[0]!r}, which isn't installed; "
            f"pip install 'pared[{extra}]' brings it."
        ) from error
