"""The house models: small teachers trained on the emoji world, shipped with the package.

`folder_of("house:pixart")` is the folder of a shipped model; any other name is taken as a folder or
hub id as it is.
"""

from pathlib import Path

from pared.errors import InputError

ROOT = Path(__file__).parent


def names() -> list[str]:
    """The shipped models, e.g. ["clip", "judge", "pixart", "vae"]."""
    return sorted(p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.json")))


def folder_of(name: str) -> str:
    """The folder behind `house:NAME`; other names come back unchanged.

    Raises:
        InputError: no house model of that name is shipped.
    """
    if not name.startswith("house:"):
        return name
    short = name.removeprefix("house:")
    if short not in names():
        shipped = ", ".join(f"house:{known}" for known in names())
        raise InputError(f"there is no house model {name!r}; shipped are {shipped}.")
    return str(ROOT / short)
