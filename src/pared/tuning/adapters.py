"""Adapter files: what tuning trained, in one safetensors file, without the base.

save_adapter(model, "food.safetensors")      the trained tensors; the settings in the metadata
load_adapter(model, "food.safetensors")      onto the base, or in the place of another one

In a file the tensors have the names of the model's parameters, without the name ("default") by
which peft tells several adapters of one layer apart. LoRA files are also read by diffusers'
`load_lora_adapter(file, prefix=None, use_safetensors=True)`.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pared import anatomy, info
from pared.errors import InputError
from pared.method import convert, denoiser, drawn_in, note_drawn, stack_of, versions
from pared.tuning.base import Adapter

# The entry of the file's metadata that says how to read it.
ENTRY = "pared"


def save_adapter(target: Any, file: str | Path) -> Path:
    """Save what the adapters of a model have trained, and nothing else.

    Args:
        target: a denoiser that carries adapters, or a pipeline that holds one.
        file: a .safetensors file, new or to be replaced.

    Returns:
        The file.

    Raises:
        InputError: the model carries no adapter, or the file can't be written.
    """
    model, file = anatomy.unwrap(denoiser(target)), Path(file)
    if not (adapters := _adapters(model)):
        raise InputError(
            "the model carries no adapter; convert it first, e.g. pared.convert(model, DiffFit())."
        )
    stack = [{"method": a.info.slug, "settings": a.model_dump(mode="json")} for a in adapters]
    about = {"model": type(model).__name__, "stack": stack, "versions": versions()}
    metadata = {"format": "pt", ENTRY: json.dumps(about)}
    for adapter in adapters:
        metadata |= adapter.metadata(anatomy.of(model))
    tensors = {k: p.detach().cpu().contiguous() for k, p in _trained(model).items()}
    beside = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, metadata)
        os.replace(beside, file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            beside.unlink()
        raise InputError(f"{file} can't be written ({error}); choose another place.") from None
    return file


def load_adapter(target: Any, file: str | Path) -> Any:
    """Put a saved adapter onto the model that it was trained on.

    A model that carries an adapter of the same settings switches to the file's: every tensor that
    the one before trained is overwritten, so nothing of it stays.

    Args:
        target: the base, or the base with an adapter of the same settings; or its pipeline.
        file: what `save_adapter` wrote.

    Returns:
        `target`.

    Raises:
        InputError: no such file, or not of this model; the model is left as it was then.
    """
    model, file = anatomy.unwrap(denoiser(target)), Path(file)
    about, tensors = _read(file)
    if about["model"] != (name := type(model).__name__):
        raise InputError(f"{file} adapts a {about['model']}; it can't be loaded onto a {name}.")
    wanted = [info.get(step["method"]).load()(**step["settings"]) for step in about["stack"]]
    present = _adapters(model)
    if present and present != wanted:
        raise InputError(
            f"{file} holds {_specs(wanted)} and the model carries {_specs(present)}; load it onto "
            "a fresh base."
        )
    fresh = [] if present else wanted
    # A rehearsal without weights: what doesn't fit is refused before anything is changed.
    _check(file, tensors, _trained(convert(_without_weights(model), *fresh)))
    convert(model, *fresh)
    with torch.no_grad():
        for key, parameter in _trained(model).items():
            parameter.copy_(tensors[key])
    note_drawn(model, (name for name in drawn_in(model) if _key(name) not in tensors))
    return target


def _adapters(model: nn.Module) -> list[Adapter]:
    return [method for method in stack_of(model) if isinstance(method, Adapter)]


def _specs(adapters: list[Adapter]) -> str:
    return " and ".join(adapter.spec() for adapter in adapters)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a model's adapters train, by their names in a file."""
    family = anatomy.of(model)
    names = {name for adapter in _adapters(model) for name in adapter.trainable(family)}
    return {_key(name): p for name, p in model.named_parameters() if name in names}


def _key(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "default")


def _without_weights(model: nn.Module) -> nn.Module:
    """A model of the same architecture on the meta device."""
    upstream = cast(Any, model)
    with torch.device("meta"):
        twin = type(upstream).from_config(upstream.config)
    return convert(twin, *stack_of(model))


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            # Copies: what safetensors gives lies in the file itself.
            tensors = {key: content.get_tensor(key).clone() for key in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} can't be read as an adapter ({error}).") from None
    if ENTRY not in metadata:
        raise InputError(f"{file} isn't an adapter that pared saved; it doesn't say of what.")
    return json.loads(metadata[ENTRY]), tensors


def _check(file: Path, tensors: dict[str, Tensor], wanted: dict[str, nn.Parameter]) -> None:
    if odd := sorted(tensors.keys() ^ wanted.keys()):
        where = "the model doesn't train" if odd[0] in tensors else "is missing there"
        raise InputError(f"{file} doesn't fit the model: {odd[0]!r} {where}.")
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            raise InputError(
                f"{file} doesn't fit the model: {key!r} has shape {tuple(tensor.shape)}, the model "
                f"needs {tuple(wanted[key].shape)}."
            )
