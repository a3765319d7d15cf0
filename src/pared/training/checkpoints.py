"""Training checkpoints: written whole or not at all, read back bit for bit.

A checkpoint is a folder `checkpoint-00000250` with `model.safetensors`, `ema.safetensors`,
`optimizer.safetensors`, `beginning.safetensors` and `state.json`. It is written beside under a
`.partial` name and renamed, so a kill at any moment leaves either the old checkpoint or the new
one. No file is a pickle.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from pared.errors import InputError
from pared.training.beginning import Beginning, check_beginning, numbers_of
from pared.training.ema import EMA

BEGINNING = "beginning.safetensors"
# Full, CPU-side dictionaries with the model's own parameter names, whatever wraps or shards the
# model.
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
# A parameter that the model holds and never calls has no gradients, and the optimizer no state.
_LENIENT = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, or None."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.suffix != ".partial"]
    return max(found, key=lambda p: p.name, default=None)


def write(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    identity: dict[str, Any],
    main_process: bool = True,
    beginning: Beginning | None = None,
    scaler: Any = None,
) -> Path:
    """Write the state after `step` optimizer steps, then delete older checkpoints.

    Every process of a distributed run must call this (gathering is collective); the main one
    writes.

    Args:
        folder: of the run.
        step: how many are done.
        model: as it trains.
        optimizer: of it.
        ema: of its weights, where there is one.
        identity: what a resumed run must share, as JSON.
        main_process: whether this one writes.
        beginning: what the run began from.
        scaler: of the loss, in float16.
    """
    target = folder / f"checkpoint-{step:08d}"
    tensors: dict[str, Any] = {"model": get_model_state_dict(model, options=_FULL)}
    if ema is not None:
        trained = {name for name, p in _named_parameters(model) if p.requires_grad}
        with ema.applied():
            averaged = get_model_state_dict(model, options=_FULL)
            # On the CPU these are the live weights, which the end of the context puts back.
            # Processes other than the main one get empty dictionaries.
            tensors["ema"] = {k: v.clone() for k, v in averaged.items() if k in trained}
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=_FULL)
    if not main_process:
        return target
    tensors["optimizer"] = _flatten(optimizer_state)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tree in tensors.items():
        save_file(
            {k: v.contiguous().clone() for k, v in tree.items()}, partial / f"{name}.safetensors"
        )
    state: dict[str, Any] = {"step": step, "identity": identity}
    if scaler is not None:
        state["scaler"] = scaler.state_dict()
    if beginning is not None:
        state["beginning"] = beginning.words
        averaged = tensors["model"] | tensors.get("ema", {})
        now = {"now": numbers_of(tensors["model"]), "averaged": numbers_of(averaged)}
        save_file(beginning.numbers | now, partial / BEGINNING)
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    for path in partial.iterdir():
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    _sync(folder)
    for old in folder.glob("checkpoint-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def read(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    identity: dict[str, Any],
    beginning: Beginning | None = None,
    scaler: Any = None,
) -> int:
    """Restore everything from `checkpoint` and return the number of steps already done.

    Raises:
        InputError: the checkpoint belongs to a run with other settings, or one that began
            otherwise; the message names the first difference.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    check_identity(checkpoint, state["identity"], identity)
    if beginning is not None and "beginning" in state:
        numbers = load_file(checkpoint / BEGINNING)
        check_beginning(checkpoint.parent, state["beginning"], numbers, beginning)
        # A model may have come with the weights of later on; the run began where it began.
        beginning.numbers["weights"] = numbers["weights"]
    weights = load_file(checkpoint / "model.safetensors")
    if ema is not None:
        _fill(model, weights | load_file(checkpoint / "ema.safetensors"), checkpoint)
        ema.read_from_model()
    _fill(model, weights, checkpoint)
    flat = load_file(checkpoint / "optimizer.safetensors")
    groups = get_optimizer_state_dict(model, optimizer, options=_FULL)["param_groups"]
    restored: Any = {"state": _unflatten(flat), "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, restored, options=_LENIENT)
    # In float16 the loss is scaled, by as much as this run has found to be right.
    if scaler is not None and "scaler" in state:
        scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def _fill(model: nn.Module, weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Put weights into a model; a checkpoint that names them otherwise is refused."""
    try:
        set_model_state_dict(model, weights, options=_FULL)
    except (RuntimeError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"{checkpoint.parent} holds weights that don't fit this model "
            f"({' '.join(str(error).split())[:200]}); go on with the version of pared that wrote "
            "them, or choose another output folder."
        ) from None


def check_identity(checkpoint: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint whose run differs from the wanted one."""
    wanted = json.loads(json.dumps(wanted))
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) != wanted.get(key):
            raise InputError(
                f"{checkpoint.parent} holds a run with {key}={saved.get(key)!r}, but this run has "
                f"{key}={wanted.get(key)!r}: resume it with its own settings or choose another "
                "output folder."
            )


def _named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters under the names that checkpoints use (wrappers' prefixes removed)."""
    return [
        (name.removeprefix("module.").replace("_orig_mod.", ""), p)
        for name, p in model.named_parameters()
    ]


def _flatten(optimizer_state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"{parameter}|{entry}": torch.as_tensor(value)
        for parameter, entries in optimizer_state["state"].items()
        for entry, value in entries.items()
    }


def _unflatten(flat: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        parameter, entry = key.rsplit("|", 1)
        state.setdefault(parameter, {})[entry] = value
    return state


def _sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on disk, where the platform allows it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows can't open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
