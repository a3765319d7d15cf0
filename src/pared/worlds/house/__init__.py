"""The house models: small teachers trained on the emoji world, shipped with the package.

`folder_of("house:pixart")` is the folder of a shipped model; any other name is taken as a folder or
hub id as it is.

Pipelines share the autoencoder, and the text encoder, which is a tower of `house:clip` and has its
vocabulary. Their folders hold what is their own, and `shared.json` says where the rest lies: for a
part a folder, for a file another file, or another file and how the names of those of its tensors
begin that make it. `folder_of` puts the whole together in the cache.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from pared.errors import InputError

ROOT = Path(__file__).parent
SHARED = "shared.json"


def names() -> list[str]:
    """The shipped models, e.g. ["clip", "judge", "pixart", "vae"]."""
    return sorted(p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.json")))


def folder_of(name: str) -> str:
    """The folder behind `house:NAME`; other names come back unchanged.

    Raises:
        InputError: no house model of that name is shipped, or there is no cache to write to.
    """
    if not name.startswith("house:"):
        return name
    short = name.removeprefix("house:")
    if short not in names():
        shipped = ", ".join(f"house:{known}" for known in names())
        raise InputError(f"there is no house model {name!r}; shipped are {shipped}.")
    folder = ROOT / short
    return str(_whole(folder) if (folder / SHARED).exists() else folder)


def _whole(folder: Path) -> Path:
    """An ordinary folder in the cache, of a model's own parts and those that it shares."""
    from huggingface_hub import cached_assets_path

    shared = json.loads((folder / SHARED).read_text())
    own = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SHARED]
    files = {p.relative_to(folder): p for p in own}
    cuts = {}
    for part, place in shared.items():
        if isinstance(place, str) and (ROOT / place).is_dir():
            found = sorted(p for p in (ROOT / place).iterdir() if p.is_file())
            files |= {Path(part, p.name): p for p in found}
        elif isinstance(place, str):
            files[Path(part)] = ROOT / place
        else:
            files[Path(part)] = ROOT / place["file"]
            cuts[Path(part)] = tuple(place["tensors"])
    states = {
        str(name): (str(p), p.stat().st_size, p.stat().st_mtime_ns) for name, p in files.items()
    }
    digest = hashlib.sha256(repr((states, cuts)).encode()).hexdigest()[:12]
    try:
        cache = Path(cached_assets_path("pared", "house"))
        target = cache / f"{folder.name}-{digest}"
        if not target.exists():
            partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=cache))
            for name, source in files.items():
                (partial / name).parent.mkdir(exist_ok=True)
                if name in cuts:
                    cut(source, partial / name, cuts[name])
                else:
                    _link(source, partial / name)
            _rename(partial, target)
    except OSError as error:
        raise InputError(
            f"house:{folder.name} has to be put together in the cache, which can't be written "
            f"({error.strerror}); set HF_HOME to a folder that can."
        ) from None
    return target


def cut(source: Path, target: Path, beginnings: tuple[str, ...]) -> None:
    """Write those tensors of a file whose names begin so."""
    from safetensors.torch import load_file, save_file

    tensors = {k: v for k, v in load_file(source).items() if k.startswith(beginnings)}
    save_file(tensors, target, metadata={"format": "pt"})


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # Windows lets few people link
        shutil.copyfile(source, target)


def _rename(partial: Path, target: Path) -> None:
    try:
        os.rename(partial, target)
    except OSError:
        shutil.rmtree(partial)
        if not target.exists():  # otherwise another process was faster, with the same files
            raise
