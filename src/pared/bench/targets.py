"""What a bill is made out for: presets, pipelines, models and folders, rebuilt on the meta device.

Only configurations are read. Nothing that was given is touched, and no weight is loaded.
"""

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pared import anatomy, info, method
from pared.anatomy import presets
from pared.checkpoint import SIDECAR, class_of, keeps_wide
from pared.errors import InputError
from pared.worlds import house

# Pixels per latent pixel of the autoencoders that a bare denoiser is usually found with.
USUAL_VAE_SCALE = 8
# Frames that each latent frame behind the first stands for, likewise.
USUAL_FRAME_SCALE = 4

Build = Callable[[torch.dtype | None], nn.Module]


@dataclass(frozen=True)
class Target:
    """The parts of a pipeline and how it usually runs.

    Attributes:
        name: what the bill is headed with.
        denoiser: builds the model that runs at every step, in the type given or its own.
        vae: builds the autoencoder, where there is one.
        encoders: build the text encoders, by name.
        steps: of the denoiser per image.
        passes: of the denoiser per step; 2 with classifier-free guidance.
        size: height and width of the picture in pixels; None leaves it to the denoiser's own
            sample size.
        text_tokens: of the prompt as the denoiser sees it; None leaves it to the family.
        prompt: tokens that a text encoder without a limit of its own reads.
        notes: what was assumed or left out.
        frames: of a video; None leaves it to the family.
    """

    name: str
    denoiser: Build
    vae: Build | None = None
    encoders: Mapping[str, Build] = field(default_factory=dict)
    steps: int = 1
    passes: int = 1
    size: tuple[int, int] | None = None
    text_tokens: int | None = None
    prompt: int | None = None
    notes: tuple[str, ...] = ()
    frames: int | None = None


def read(target: Any) -> Target:
    """Find out what a bill is asked for.

    Args:
        target: name of a preset or a house model, folder of a pipeline or of a model, a diffusers
            pipeline, or a denoiser.

    Raises:
        InputError: it is none of these, or can't be rebuilt from its configuration.
    """
    if isinstance(target, str) and target in presets.names():
        return _of_preset(target)
    if isinstance(target, str | Path):
        return _of_folder(target)
    if hasattr(target, "components"):
        models = {n: part for n, part in target.components.items() if _is_model(part)}
        builds = {name: _live(part) for name, part in models.items() if _is_billed(name)}
        configs = {name: part.config for name, part in models.items()}
        others = sorted(models.keys() - builds)
        return _of_pipeline(type(target).__name__, type(target), builds, configs, others)
    anatomy.of(target)  # refuses what can't be read
    return _of_denoiser(type(anatomy.unwrap(target)).__name__, _live(target))


# Presets --------------------------------------------------------------------------------------


def _of_preset(name: str) -> Target:
    preset = presets.get(name)
    if isinstance(preset, presets.SpeechPreset):
        return Target(name=name, denoiser=partial(_build_preset, name, "recogniser"))
    builds = {part: partial(_build_preset, name, part) for part in preset.components}
    return Target(
        name=name,
        denoiser=builds.pop("denoiser"),
        vae=builds.pop("vae"),
        encoders=builds,
        steps=preset.steps,
        passes=preset.passes,
        size=(preset.height, preset.width),
        text_tokens=preset.text_tokens or None,
        prompt=max((part.tokens for part in preset.text_encoders), default=None),
        frames=preset.frames if preset.frames > 1 else None,
    )


def _build_preset(name: str, part: str, dtype: torch.dtype | None) -> nn.Module:
    return presets.build(name, dtype=dtype, component=part)


# Pipelines and models -------------------------------------------------------------------------


def _of_pipeline(
    name: str,
    pipeline: type,
    builds: dict[str, Build],
    configs: dict[str, Any],
    others: list[str],
) -> Target:
    denoiser = next((n for n in ("transformer", "unet") if n in builds), None)
    if denoiser is None:
        raise InputError(f"{name} has neither a transformer nor a unet; give the denoiser itself.")
    defaults = {k: p.default for k, p in inspect.signature(pipeline.__call__).parameters.items()}
    return Target(
        name=name,
        denoiser=builds[denoiser],
        vae=builds.get("vae"),
        encoders={n: b for n, b in builds.items() if n.startswith("text_encoder")},
        steps=defaults.get("num_inference_steps", 1),
        passes=_passes(defaults, configs[denoiser]),
        prompt=defaults.get("max_sequence_length"),
        notes=(f"{', '.join(others)} not included",) if others else (),
        frames=defaults.get("num_frames"),
    )


def _passes(defaults: dict[str, Any], config: Mapping[str, Any]) -> int:
    """Passes per step, from a pipeline's default arguments and its denoiser's configuration."""
    scale = defaults.get("guidance_scale")
    if "true_cfg_scale" in defaults:
        # Where both exist, this one is classifier-free and the other an input of the denoiser.
        scale = defaults["true_cfg_scale"]
    elif "guidance_embeds" in config or config.get("time_cond_proj_dim"):
        scale = None  # FLUX, and U-Nets that had their guidance distilled into them
    passes = 1
    if isinstance(scale, int | float) and scale > 1:
        # Where a picture guides beside the prompt, one pass has both, one it alone, one neither.
        passes = 3 if "image_guidance_scale" in defaults else 2
    return passes + (defaults.get("pag_scale", 0) > 0)  # with perturbed attention


def _of_denoiser(name: str, build: Build) -> Target:
    note = "a denoiser alone, without autoencoder and text encoders"
    return Target(name=name, denoiser=build, notes=(note,))


def _is_model(part: Any) -> bool:
    return isinstance(part, nn.Module) and hasattr(part, "config")


def _is_billed(component: str) -> bool:
    return component in ("transformer", "unet", "vae") or component.startswith("text_encoder")


def _live(model: nn.Module) -> Build:
    """Builds a twin of a model, with the conversions that it carries."""
    model = anatomy.unwrap(model)
    cls: Any = type(model)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        # A copy, since transformers writes into the configuration it builds from.
        config = type(config).from_dict(config.to_dict())
    # Weights in a byte or less are a way of storing; their model computes in something wider.
    floating = ((n, p) for n, p in model.named_parameters() if p.is_floating_point())
    wide = {name: p.dtype for name, p in floating if p.itemsize > 1}
    apart = {name: kind for name, kind in wide.items() if keeps_wide(model, name)}
    own = next((kind for name, kind in wide.items() if name not in apart), torch.float32)
    return partial(_rebuild, cls, config, tuple(method.stack_of(model)), own, apart)


def _rebuild(
    cls: Any,
    config: Any,
    stack: tuple[method.Conversion, ...],
    own: torch.dtype,
    apart: Mapping[str, torch.dtype],
    dtype: torch.dtype | None,
) -> nn.Module:
    """A model on the meta device, from its class and configuration.

    Args:
        cls: class of the model.
        config: its configuration.
        stack: the conversions that it carries.
        own: type of its weights.
        apart: types of the weights that its library keeps in another, by their names.
        dtype: type of all weights, in the place of these.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or own)
    try:
        with torch.device("meta"):
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    finally:
        torch.set_default_dtype(before)
    model = method.convert(model.eval(), *stack) if stack else model.eval()
    for name, parameter in model.named_parameters():
        if dtype is None and name in apart:
            parameter.data = parameter.data.to(apart[name])
    return model


# Folders --------------------------------------------------------------------------------------


def _of_folder(name: str | Path) -> Target:
    folder = Path(house.folder_of(str(name)))
    if not folder.is_dir():
        near = difflib.get_close_matches(str(name).lower(), presets.names(), n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise InputError(
            f"there is no folder and no preset {str(name)!r}{hint}; give a saved pipeline or "
            f"model, or one of the presets {', '.join(presets.names())}."
        )
    if (folder / "model_index.json").exists():
        index = _json(folder / "model_index.json")
        cls = _class("diffusers", index.get("_class_name"), folder)
        # What has a configuration of this name is a model; schedulers and tokenizers have others.
        models = {part for part in index if (folder / part / "config.json").exists()}
        builds = {
            part: _stored(folder / part, index[part][0], index[part][1], _steps(folder, part))
            for part in sorted(filter(_is_billed, models))
        }
        configs = {part: _json(folder / part / "config.json") for part in builds}
        return _of_pipeline(str(name), cls, builds, configs, sorted(models - builds.keys()))
    if (folder / "config.json").exists():
        library, cls = class_of(_json(folder / "config.json"))
        return _of_denoiser(str(name), _stored(folder, library, cls, _steps(folder, "")))
    raise InputError(
        f"{folder} is not a model: it has neither a model_index.json nor a config.json."
    )


def _stored(folder: Path, library: str, name: str | None, steps: list[dict[str, Any]]) -> Build:
    """Builds a stored model, without its weights."""
    config = _json(folder / "config.json")
    cls = _class(library, name or config.get("_class_name"), folder)
    if library == "transformers":
        config = cls.config_class.from_dict(config)
    stack = tuple(info.get(s["method"]).load()(**s["settings"]) for s in steps)
    return partial(_rebuild, cls, config, stack, torch.float32, {})


def _steps(folder: Path, part: str) -> list[dict[str, Any]]:
    """The conversions that a folder's sidecar lists for one part of a pipeline ("" for a model)."""
    if not (folder / SIDECAR).exists():
        return []
    return [step for step in _json(folder / SIDECAR)["stack"] if step["target"] == part]


def _class(library: str, name: str | None, folder: Path) -> Any:
    # A folder names its libraries; no other code than these two is run for it.
    cls = None
    if library in ("diffusers", "transformers") and name:
        cls = getattr(importlib.import_module(library), name, None)
    if cls is None:
        raise InputError(
            f"{folder} holds a {library}.{name}; pared bills classes of diffusers and transformers."
        )
    return cls


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}); the folder is not complete.") from None
