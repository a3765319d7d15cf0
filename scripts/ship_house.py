"""Puts a trained house model into the package: half the bytes, the same behaviour.

    python scripts/ship_house.py runs/house-pixart/model pixart

Weights are stored in float16 and still load in float32; a converted model keeps its `pared.json`,
with the digests and the fingerprint of what is shipped. A part that another house model holds
already, such as the autoencoder or a tower of the CLIP, is left out and named in `shared.json`.
"""

import argparse
import filecmp
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pared import checkpoint
from pared.method import denoiser
from pared.worlds import house

# The model whose towers and vocabulary others share, and the files that these lie in.
CLIP, WEIGHTS, VOCABULARY = "clip", "model.safetensors", "tokenizer.json"


def halve(path: Path) -> None:
    """Rewrite one weight file in float16."""
    tensors = load_file(path)
    half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in half.items()}, path, metadata={"format": "pt"})


def share(folder: Path) -> None:
    """Leave out what another house model holds, byte for byte the same, and say where it is."""
    candidates = [p for p in (*house.ROOT.glob("*"), *house.ROOT.glob("*/*")) if p.parent != folder]
    known = {contents(p): p for p in sorted(candidates, reverse=True) if p.is_dir()}
    vocabulary = house.ROOT / CLIP / VOCABULARY
    shared: dict[str, Any] = {}
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        if contents(part) and (other := known.get(contents(part))) not in (None, folder):
            shutil.rmtree(part)
            shared[part.name] = other.relative_to(house.ROOT).as_posix()
        elif (path := part / WEIGHTS).exists() and (tensors := of_clip(path)):
            path.unlink()
            cut = {"file": f"{CLIP}/{WEIGHTS}", "tensors": tensors}
            shared[path.relative_to(folder).as_posix()] = cut
        elif (path := part / VOCABULARY).exists() and filecmp.cmp(path, vocabulary, shallow=False):
            path.unlink()
            shared[path.relative_to(folder).as_posix()] = f"{CLIP}/{VOCABULARY}"
    if shared:
        (folder / house.SHARED).write_text(json.dumps(shared, indent=1) + "\n")


def of_clip(path: Path) -> list[str]:
    """The parts of `house:clip` that a weight file consists of; nothing where it doesn't."""
    beginnings = sorted({f"{name.partition('.')[0]}." for name in load_file(path)})
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        house.cut(house.ROOT / CLIP / WEIGHTS, Path(file.name), tuple(beginnings))
        return beginnings if filecmp.cmp(file.name, path, shallow=False) else []


def contents(folder: Path) -> tuple[tuple[str, str], ...]:
    """Names and digests of the files of a part; nothing where it has no weights."""
    files = sorted(p for p in folder.glob("*") if p.is_file())
    if not any(p.suffix == ".safetensors" for p in files):
        return ()
    return tuple((p.name, checkpoint.digest(p)) for p in files)


def clean(path: Path) -> None:
    """Forget where the model lay; let transformers load it in float32, whatever the file holds."""
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    if "model_type" in config:  # diffusers loads in float32 by itself
        # Each tower may be loaded by itself and then reads its own table.
        for table in (config, config.get("text_config", {}), config.get("vision_config", {})):
            table["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def renew_sidecar(folder: Path) -> None:
    """Digests and fingerprint of the files as they are now."""
    path = folder / checkpoint.SIDECAR
    if not path.exists():
        return
    sidecar = json.loads(path.read_text())
    path.write_text(json.dumps(sidecar | {"files": {}, "dtype": "float32"}))
    model = denoiser(checkpoint.load(folder))
    assert next(model.parameters()).dtype == torch.float32
    sidecar |= {
        "files": {
            str(p.relative_to(folder)): checkpoint.digest(p)
            for p in sorted(folder.rglob("*.safetensors"))
        },
        "dtype": "float32",
        "fingerprint": checkpoint.fingerprint(model),
    }
    path.write_text(json.dumps(sidecar, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the trained model")
    parser.add_argument("name", help="its name among the house models, e.g. pixart")
    options = parser.parse_args()

    def write(folder: Path) -> None:
        shutil.copytree(options.source, folder, dirs_exist_ok=True)
        for path in folder.rglob("*.safetensors"):
            halve(path)
        for path in (*folder.rglob("config.json"), *folder.glob("model_index.json")):
            clean(path)
        renew_sidecar(folder)

    target = house.ROOT / options.name
    checkpoint.replaced_by(target, write)
    share(target)
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    print(f"{target}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
