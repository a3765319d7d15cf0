"""`pared doctor`: what this machine offers. Looks only at this machine, never at the network."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

import click

from pared import __version__
from pared.cli import common

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "pydantic",
    "huggingface_hub", "numpy", "pillow", "click",
)  # fmt: skip

# Distribution -> the extra of pared that brings it, and what it is for.
OPTIONAL = {
    "pyarrow": ("data", "the emoji world and parquet files"),
    "datasets": ("data", "datasets of the hub and of folders"),
    "webdataset": ("data", "training shards in .tar files"),
    "peft": ("adapters", "low-rank adapters"),
    "soundfile": ("speech", "recordings in WAV, FLAC, OGG and MP3"),
    "jiwer": ("speech", "word error rates"),
    "pesq": ("measure-speech", "how enhanced speech sounds"),
    "pystoi": ("measure-speech", "how well enhanced speech is understood"),
    "speechmos": ("measure-speech", "what listeners would say of enhanced speech"),
    "librosa": ("measure-speech", "speechmos, which doesn't bring it"),
    "requests": ("measure-speech", "speechmos, which doesn't bring it"),
    "trackio": ("track", "a dashboard for trainings"),
    "onnx": ("export", "files for other runtimes"),
    "onnxscript": ("export", "files for other runtimes"),
    "onnxruntime": ("export", "running such files"),
    "sounddevice": ("microphone", "enhancing what a microphone hears"),
}

# Makes oneDNN, by which torch multiplies on processors, leave the matrix units (AMX) alone.
WITHOUT_AMX = "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@click.command()
@common.json_option
def command(as_json: bool) -> None:
    """Show what this machine offers: libraries, devices, disk.

    Good as a first look, and at the top of a bug report. Nothing is sent and no network is used.

    \b
    Examples:
      pared doctor
      pared doctor --json
    """
    found = examine()
    common.print_json(found) if as_json else _print(found)


def examine() -> dict[str, Any]:
    """Everything that the command shows."""
    from pared.worlds import house

    return {
        "pared": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        **_torch(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "extras": [
            {"package": name, "version": _version(name), "for": purpose, "extra": extra}
            for name, (extra, purpose) in OPTIONAL.items()
        ],
        "offline": {name: os.environ[name] for name in OFFLINE if name in os.environ},
        "cache": _cache(),
        "house_models": house.names(),
    }


def _torch() -> dict[str, Any]:
    """Processors and accelerators as torch sees them."""
    try:
        import torch
    except (ImportError, OSError) as error:  # the very case in which a doctor is called
        return {"devices": [], "threads": None, "problem": f"torch can't be imported ({error})"}
    from pared import processor
    from pared.bench import host

    cpu = {"name": "cpu", "model": host.cpu_name(), "bf16": processor.multiplies_bf16()}
    cpu["bf16_right"] = _bf16_is_right()
    return {
        "devices": [cpu, *_accelerators(torch)],
        "threads": {"torch": torch.get_num_threads(), "cores": host.usable_cores()},
    }


def _bf16_is_right() -> bool:
    """Whether the processor's bfloat16 convolutions give what those in float32 give.

    Some versions of oneDNN get them wrong by means of AMX: grouped ones wholly, as the positions of
    wav2vec 2.0 are, and products whose inner size isn't a multiple of 32 may come out as NaN
    (github.com/uxlfoundation/oneDNN/issues/5717).
    """
    import torch
    import torch.nn.functional as F

    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, generator=rng).bfloat16() for size in ((1, 32, 25), (32, 8, 8)))
    right = F.conv1d(x.float(), w.float(), padding=4, groups=4)
    found = F.conv1d(x, w, padding=4, groups=4).float()
    return bool((found - right).norm() < 0.05 * right.norm())


def _accelerators(torch: Any) -> list[dict[str, Any]]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type
    found = []
    for index in range(torch.accelerator.device_count()):
        device: dict[str, Any] = {"name": f"{kind}:{index}"}
        if kind == "cuda":
            properties = torch.cuda.get_device_properties(index)
            device["model"] = properties.name
            device["memory_gib"] = round(properties.total_memory / 2**30, 1)
            device["bf16"] = properties.major >= 8
        found.append(device)
    return found


def _cache() -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = os.path.abspath(HF_HUB_CACHE)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = {"cache": place, "here": os.getcwd()}
    return {
        "folder": str(HF_HUB_CACHE),
        "exists": os.path.isdir(HF_HUB_CACHE),
        "free_gib": {k: round(shutil.disk_usage(v).free / 2**30, 1) for k, v in free.items()},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(found: dict[str, Any]) -> None:
    def line(name: str, text: str) -> None:
        click.echo(f"{name:<16}{text}")

    line("pared", found["pared"])
    line("python", found["python"])
    line("system", found["system"])
    if problem := found.get("problem"):
        line("problem", problem)
    for device in found["devices"]:
        parts = [
            device.get("model", ""),
            f"{device['memory_gib']} GiB" if "memory_gib" in device else "",
        ]
        if "bf16" in device:
            parts.append("bfloat16 native" if device["bf16"] else "bfloat16 only emulated (slow)")
        if not device.get("bf16_right", True):
            parts.append(f"but torch gets it WRONG here: set {WITHOUT_AMX} in the environment")
        line(device["name"], ", ".join(filter(None, parts)))
    if threads := found["threads"]:
        line("threads", f"{threads['torch']} used by torch, {threads['cores']} cores usable")
    for name, version in found["libraries"].items():
        line(name, version or f"MISSING: pip install {name}")
    for extra in found["extras"]:
        name, version = extra["package"], extra["version"]
        missing = f'not installed (for {extra["for"]}): pip install "pared[{extra["extra"]}]"'
        line(name, version or missing)
    flags = ", ".join(f"{name}={value}" for name, value in found["offline"].items())
    line("offline", flags or "no flag is set: hub models may be downloaded when asked for by id")
    cache = found["cache"]
    state = "" if cache["exists"] else " (not there yet)"
    line("hub cache", f"{cache['folder']}{state}, {cache['free_gib']['cache']} GiB free")
    line("disk here", f"{cache['free_gib']['here']} GiB free")
    line("house models", ", ".join(found["house_models"]) or "none")
