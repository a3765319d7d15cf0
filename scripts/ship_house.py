"""Puts a trained house model into the package: half the bytes, the same behaviour.

    python scripts/ship_house.py runs/house-pixart/model pixart

Weights are stored in float16 and still load in float32; a converted model keeps its `pared.json`,
with the digests and the fingerprint of what is shipped. A file that another house model holds
already, such as the autoencoder, becomes a link to it.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pared import checkpoint
from pared.method import denoiser
from pared.worlds import house


def halve(path: Path) -> None:
    """Rewrite one weight file in float16."""
    tensors = load_file(path)
    half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in half.items()}, path, metadata={"format": "pt"})


def share(folder: Path) -> None:
    """Put links in the place of weights that another house model holds, a part by itself first."""
    others = [p for p in house.ROOT.rglob("*.safetensors") if not p.is_symlink()]
    held = {checkpoint.digest(p): p for p in others if folder not in p.parents}
    held |= {checkpoint.digest(p): p for p in others if p.parent.parent == house.ROOT}
    for path in sorted(folder.rglob("*.safetensors")):
        digest = checkpoint.digest(path)
        if (other := held.setdefault(digest, path)) != path:
            path.unlink()
            path.symlink_to(os.path.relpath(other, path.parent))


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
    files = [p for p in target.rglob("*") if p.is_file() and not p.is_symlink()]
    size = sum(p.stat().st_size for p in files)
    print(f"{target}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
