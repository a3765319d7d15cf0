"""Saving and loading converted models and pipelines.

A saved model is the folder that diffusers or transformers would write (safetensors, `config.json`)
plus one file, `pared.json`: the conversions in order, library versions, a digest of every weight
file, the type of the weights (of a pipeline each part's), and a fingerprint of the model's output
on fixed inputs. Loading builds the model from its own configuration on the meta device, replays the
conversions, fills the weights and refuses unknown or missing names. Nothing is ever unpickled.
"""

import copy
import hashlib
import importlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pared import anatomy, info, method
from pared.anatomy.intact import require_intact, watching
from pared.errors import InputError
from pared.nn.modes import in_eval_mode

SIDECAR = "pared.json"
# What configurations call the number of blocks.
DEPTHS = (
    "num_layers",
    "num_single_layers",
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
)
# Types that models compute in, as safetensors calls them; narrower ones are ways of storing.
TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def save(
    target: Any, folder: str | Path, max_shard_size: str = "10GB", files: Iterable[Path] = ()
) -> Path:
    """Save a denoiser or a pipeline with the conversions it carries.

    The folder is written beside under another name and then swapped in, so a full disk or a kill
    leaves the old state.

    Args:
        target: a model of diffusers or transformers, or a diffusers pipeline; wrappers
            (torch.compile, DDP) are left out.
        folder: new, empty, or a model folder to replace.
        max_shard_size: largest weight file.
        files: to copy beside the weights, such as those of a tokenizer; they may be in `folder`.

    Returns:
        The folder.

    Raises:
        InputError: the folder holds something that is not a model, or can't be written; or
            something is on the model that loading wouldn't know of, such as adapters of another
            library.
    """
    folder = Path(folder)
    check_replaceable(folder)
    # A pipeline saves its components as they are; a bare model is taken out of its wrappers first.
    plain = target if hasattr(target, "components") else anatomy.unwrap(target)
    for name, part in _parts(plain).items():
        _check_adapters(name, part)
        require_intact(part)
        if method.stack_of(part) or part is plain:
            _check_names(name, part)

    def write(beside: Path) -> None:
        plain.save_pretrained(beside, max_shard_size=max_shard_size, **_own_names(plain))
        (beside / SIDECAR).write_text(json.dumps(_sidecar(target, beside), indent=1) + "\n")
        for file in files:
            shutil.copyfile(file, beside / file.name)

    replaced_by(folder, write)
    return folder


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool = False,
) -> Any:
    """Load what `save` wrote, or an ordinary folder of a model or of a diffusers pipeline.

    Args:
        folder: the folder.
        dtype: type of the weights; by default as saved, each part of a pipeline in its own.
        device: where to put them.
        verify: also run the model once and compare with the output that it had when it was saved.

    Returns:
        A model or a pipeline, in eval mode, that carries its conversions.

    Raises:
        InputError: no model there; weights truncated, tampered with, missing, left over or pickled.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}; give a saved model or pipeline.")
    sidecar: dict[str, Any] = {"stack": [], "files": {}, "dtype": None, "fingerprint": None}
    if (folder / SIDECAR).exists():
        sidecar |= _read_json(folder / SIDECAR)
    _check_files(folder, sidecar["files"])
    # One type is a single model's, or in folders of earlier versions that of a whole pipeline.
    if dtype is None and isinstance(sidecar["dtype"], str):
        dtype = getattr(torch, sidecar["dtype"])
    if (folder / "model_index.json").exists():
        found = _load_pipeline(folder, sidecar, dtype, device)
    elif (folder / "config.json").exists():
        found = _load_model(folder, sidecar["stack"], dtype, device)
    else:
        raise InputError(
            f"{folder} is not a model: it has neither a model_index.json nor a config.json."
        )
    if verify:
        _verify(found, sidecar["fingerprint"], folder)
    return found


def _verify(target: Any, wanted: list[float] | None, folder: Path) -> None:
    """Refuse a model that doesn't compute what it computed when it was saved."""
    if wanted is None:
        raise InputError(f"{folder} was saved without a fingerprint; load it without verify.")
    found = fingerprint(anatomy.unwrap(method.denoiser(target)))
    # Wide enough for another processor or number format, and far below any wrong weight.
    if not torch.allclose(torch.tensor(found), torch.tensor(wanted), rtol=2e-2, atol=2e-2):
        raise InputError(
            f"{folder} computes {found[:2]}... but computed {wanted[:2]}... when it was saved; "
            f"it was made with {_read_json(folder / SIDECAR)['versions']}."
        )


def fingerprint(model: nn.Module) -> list[float] | None:
    """A few numbers of the model's output on fixed inputs, or None where that would be costly."""
    parameters = list(model.parameters())
    if parameters[0].device.type == "meta" or sum(p.numel() for p in parameters) > 100_000_000:
        return None
    family = anatomy.of(model)
    example = family.example(generator=torch.Generator().manual_seed(0), **family.brief)
    with torch.no_grad(), in_eval_mode(model):
        output = family.run(model, *example).float().flatten()
    return [float(x) for x in output[:: max(1, len(output) // 8)][:8]]


# Writing
# --------------------------------------------------------------------------------------------------


def replaced_by(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a fresh folder beside `folder`, then swap it in.

    Raises:
        InputError: the place can't be written or the disk is full; what was there before stays.
    """
    try:
        folder = folder.resolve()  # a link stays one
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"{folder} can't be written ({error.strerror}); choose another folder."
        ) from None
    old = beside.with_name(beside.name + "-old")
    try:
        write(beside)
        beside.chmod(0o755)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(beside, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{folder} could not be written ({reason}); nothing was changed there."
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _parts(target: Any) -> dict[str, nn.Module]:
    """The models of a pipeline, by name; or a model alone, by its class."""
    if not hasattr(target, "components"):
        return {type(target).__name__: target}
    found = target.components.items()
    return {name: anatomy.unwrap(part) for name, part in found if isinstance(part, nn.Module)}


def _check_adapters(name: str, part: nn.Module) -> None:
    """Refuse layers of peft that another library put in: loading wouldn't know of them.

    Adapters of pared's own are replayed as conversions, and leave no `peft_config` behind.
    """
    own = {path for look in watching(part) for path in look.paths}
    wrapped = {path for path, m in part.named_modules() if hasattr(m, "get_base_layer")}
    if wrapped - own or (wrapped and getattr(part, "peft_config", None)):
        ours = "merge pared's own first, then " if wrapped & own else ""
        raise InputError(
            f"the {name} carries adapters of peft, which can't be saved with it; {ours}fuse them "
            "(fuse_lora, then unload_lora_weights) or take them off (unload_lora_weights alone)."
        )


def _check_names(name: str, part: nn.Module) -> None:
    """Refuse weights of other names than those of the model that loading builds to take them in."""
    if hasattr(part, "tie_weights") and not method.stack_of(part):
        return  # that transformers opens itself, which knows older names
    with torch.device("meta"):
        twin = _empty(type(part), _config_of(part))
    for step in method.stack_of(part):
        method.convert(twin, step)
    mine, known = part.state_dict().keys(), twin.state_dict().keys()
    for what, names in (
        ("has a weight that loading wouldn't know,", sorted(mine - known)),
        ("lacks a weight that loading would want,", sorted(known - mine)),
    ):
        if names:
            raise InputError(
                f"the {name} {what} {names[0]!r}; take off again what was put in or taken out "
                "beside pared's conversions (an IP-Adapter or fused projections, say)."
            )


def check_replaceable(folder: Path) -> None:
    """Refuse a place that `save` would refuse.

    Raises:
        InputError: a file, or a folder that holds something else than a model.
    """
    if folder.is_file():
        raise InputError(f"{folder} is a file; give the name of a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        known = ("model_index.json", "config.json", SIDECAR)
        if not any((folder / name).exists() for name in known):
            raise InputError(
                f"{folder} holds something that is not a model; choose a new or empty folder."
            )


def _sidecar(target: Any, folder: Path) -> dict[str, Any]:
    model = anatomy.unwrap(method.denoiser(target))
    component = ""
    if hasattr(target, "components"):
        component = next(
            name for name, part in target.components.items() if part is method.denoiser(target)
        )
    return {
        "pared": 1,
        "versions": method.versions(),
        "stack": [
            {"method": m.info.slug, "settings": m.model_dump(mode="json"), "target": component}
            for m in method.stack_of(model)
        ],
        "files": {
            str(p.relative_to(folder)): digest(p) for p in sorted(folder.rglob("*.safetensors"))
        },
        "dtype": _types(target),
        "fingerprint": fingerprint(model),
    }


def _types(target: Any) -> str | dict[str, str]:
    """The type of a model's weights, or that of every part of a pipeline."""
    if hasattr(target, "components"):
        parts = {n: getattr(part, "dtype", None) for n, part in target.components.items()}
        return {n: str(kind).removeprefix("torch.") for n, kind in parts.items() if kind}
    return str(cast(Any, anatomy.unwrap(target)).dtype).removeprefix("torch.")


def _own_names(model: Any) -> dict[str, bool]:
    """What keeps transformers from giving the weights of a converted model older names."""
    converted = hasattr(model, "tie_weights") and bool(method.stack_of(model))
    return {"save_original_format": False} if converted else {}


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Reading
# --------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} can't be read ({error}); the model was not saved completely."
        ) from None


def _check_files(folder: Path, digests: dict[str, str]) -> None:
    """Refuse pickled weights, and weight files that are not the ones that were saved."""
    pickles = [
        p
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
        for p in sorted(folder.rglob(pattern))
    ]
    if pickles and not list(folder.rglob("*.safetensors")):
        raise InputError(
            f"{pickles[0]} is a pickle, which can run code when it is opened; convert the weights "
            "to safetensors with the tool that made them."
        )
    for name, wanted in digests.items():
        if not (path := folder / name).exists():
            raise InputError(f"{path} is missing; the model was not copied completely.")
        if digest(path) != wanted:
            raise InputError(
                f"{path} is not the file that was saved (its checksum differs); copy the model "
                "again."
            )


def _load_pipeline(
    folder: Path, sidecar: dict[str, Any], dtype: torch.dtype | None, device: Any
) -> Any:
    from diffusers import DiffusionPipeline

    types = {"default": dtype} if dtype else _own_types(folder, sidecar["dtype"] or {})
    replaced = {}
    for name in {step["target"] for step in sidecar["stack"]}:
        steps = [s for s in sidecar["stack"] if s["target"] == name]
        replaced[name] = _load_model(folder / name, steps, types.get(name, dtype), device)
    try:
        with _unasked_types():
            pipeline = DiffusionPipeline.from_pretrained(
                folder, use_safetensors=True, dtype=types, **absent_parts(folder), **replaced
            )
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{folder} can't be opened as a pipeline: {_first_line(error)}.") from None
    return pipeline.to(device)


def _own_types(folder: Path, told: dict[str, str]) -> dict[str, torch.dtype]:
    """The type of each part of a pipeline, as the sidecar tells it or else the weight files.

    Left to themselves, diffusers would take float32 and transformers what was saved.
    """
    if told:
        return {name: getattr(torch, kind) for name, kind in told.items()}
    found = {part.name: _type_in(part) for part in folder.iterdir() if part.is_dir()}
    return {name: kind for name, kind in found.items() if kind is not None}


def _type_in(folder: Path) -> torch.dtype | None:
    """The type that most weights in a folder have; None where there are none to compute with."""
    count: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        if "." in path.stem:  # a variant, such as model.fp16.safetensors
            continue
        with _weights(path) as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                one = weights.get_slice(key)
                count[one.get_dtype()] += math.prod(one.get_shape())
    usual = [TYPES[name] for name, _ in count.most_common() if name in TYPES]
    return usual[0] if usual else None


def absent_parts(place: str | Path) -> dict[str, None]:
    """The parts that a saved pipeline goes without, such as the T5 encoder of an SD3.

    Diffusers wants them named when it opens the pipeline again.

    Args:
        place: a pipeline's folder or its name on the hub.
    """
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(place)
    return {name: None for name, part in index.items() if part == [None, None]}


@contextmanager
def _unasked_types() -> Iterator[None]:
    """Keep diffusers from warning that a part is of another class than the pipeline's usual one.

    The folder itself names the class of each part, so whoever made it meant it.
    """
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def asked(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Expected types for ")

    logger.addFilter(asked)
    try:
        yield
    finally:
        logger.removeFilter(asked)


def _load_model(
    folder: Path, steps: list[dict[str, Any]], dtype: torch.dtype | None, device: Any
) -> nn.Module:
    config = _read_json(folder / "config.json")
    library, name = class_of(config)
    cls = getattr(importlib.import_module(library), name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InputError(
            f"{folder} holds a {name}, which {library} doesn't have; pared loads models of "
            "diffusers and transformers."
        )
    if library == "transformers" and not steps:
        return _opened(cls, folder, dtype).to(device).eval()
    with torch.device("meta"):
        model = _empty(cls, config)
    for step in steps:
        method.convert(model, info.get(step["method"]).load()(**step["settings"]))
    _fill(model, folder, dtype, torch.device(device))
    method.note_drawn(model, ())
    return model.eval()


def class_of(config: dict[str, Any]) -> tuple[str, str]:
    """The library and the name of the class that a model's configuration is for."""
    if "_class_name" not in config and config.get("architectures"):
        return "transformers", config["architectures"][0]
    return "diffusers", config.get("_class_name") or "nothing"


def _empty(cls: Any, config: dict[str, Any]) -> nn.Module:
    """A model from its configuration, freshly initialised."""
    if hasattr(cls, "from_config"):
        return cls.from_config(config)
    # A copy, since transformers takes entries out of what it reads.
    return cls(cls.config_class.from_dict(copy.deepcopy(config)))


def _opened(cls: Any, folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """An ordinary folder, read by transformers, which knows older names of published weights."""
    keywords = {} if dtype is None else {"dtype": dtype}
    try:
        model, found = cls.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **keywords,
        )
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} can't be opened as a model: {_first_line(error)}.") from None
    spare = getattr(anatomy.families().get(cls.__name__), "spare", ())
    lost = sorted(key for key in found["missing_keys"] if not key.endswith(spare))
    for what, names in (
        ("lacks the weight", lost),
        ("has another shape of the weight", sorted(n for n, *_ in found["mismatched_keys"])),
        ("has a weight that the model doesn't know,", sorted(found["unexpected_keys"])),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder} {what} {names[0]!r}{more}.")
    return model


def _fill(model: nn.Module, folder: Path, dtype: torch.dtype | None, device: torch.device) -> None:
    """Put the folder's safetensors into a model on the meta device; every name must fit."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no .safetensors weights; pared opens no other format.")
    wanted = dict(model.named_parameters()) | dict(_persistent_buffers(model))
    left = set(wanted)
    for path in files:
        with _weights(path, device) as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                if key not in wanted:
                    raise InputError(f"{path} has a weight {key!r} that the model doesn't know.")
                tensor = _fitting(weights.get_tensor(key), wanted[key], path, key)
                _set(model, key, tensor, _wide_enough(model, key, tensor, dtype))
                left.discard(key)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(f"{folder} lacks the weight {min(left)!r}{more}.")
    if hasattr(model, "tie_weights"):  # a weight under two names is saved under one
        model.tie_weights()
    _rebuild_buffers(model, device)


@contextmanager
def _weights(path: Path, device: str | torch.device = "cpu") -> Iterator[Any]:
    """A file of safetensors, open; one that is damaged is refused."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as weights:
            yield weights
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is damaged ({_first_line(error)}); copy the model again."
        ) from None


def _fitting(tensor: torch.Tensor, wanted: torch.Tensor, path: Path, key: str) -> torch.Tensor:
    if tensor.shape != wanted.shape:
        raise InputError(
            f"{path}: {key!r} has shape {tuple(tensor.shape)}, the model needs "
            f"{tuple(wanted.shape)}."
        )
    return tensor


def _wide_enough(
    model: nn.Module, key: str, tensor: torch.Tensor, dtype: torch.dtype | None
) -> torch.dtype | None:
    """The type for a weight: diffusers keeps some, such as Wan's tables, in more than the rest."""
    if dtype is None or not keeps_wide(model, key):
        return dtype
    return torch.promote_types(tensor.dtype, dtype)


def keeps_wide(model: nn.Module, name: str) -> bool:
    """Whether a model's library keeps the weight of that name in float32, whatever the rest has."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return not set(kept).isdisjoint(name.split("."))


def _set(model: nn.Module, key: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> None:
    parent, _, name = key.rpartition(".")
    module = model.get_submodule(parent)
    # A copy: what safetensors gives lies in the file itself, and at an address for which the
    # processor's kernels may round differently than for memory of torch's own.
    tensor = tensor.to(dtype if tensor.is_floating_point() else None, copy=True)
    if (old := module._parameters.get(name)) is not None:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[name] = tensor


def _persistent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, buffer) for name, buffer in model.named_buffers() if name in model.state_dict()]


def _rebuild_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that aren't saved (position tables): a real twin has them."""
    lost = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta"]
    if not lost:
        return
    values = dict(_twin(model).named_buffers())
    for name in lost:
        _set(model, name, values[name].to(device), None)


def _twin(model: nn.Module) -> nn.Module:
    """The unconverted model, freshly initialised, with the fewest layers that it can have."""
    config = _config_of(model)
    return _empty(type(model), config | {key: 1 for key in DEPTHS if config.get(key)})


def _config_of(model: nn.Module) -> dict[str, Any]:
    """A copy of a model's configuration."""
    config: Any = model.config
    return copy.deepcopy(config.to_dict() if hasattr(config, "to_dict") else dict(config))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
