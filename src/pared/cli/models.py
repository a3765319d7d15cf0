"""The MODEL argument: a house model, a preset, a folder or a hub id. Found first, loaded later."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click
from click.shell_completion import CompletionItem

from pared.anatomy import presets
from pared.errors import InputError
from pared.worlds import house

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a single model has in its folder: configurations, vocabularies, weights.
MODEL_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
# What may lie beside them: in folders other forms, such as ONNX, and another language's adapter,
# of which some recognisers have a thousand.
OTHER_FILES = ["*/*", "adapter.*"]


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as the user wrote it.
        kind: "preset" (a configuration with random weights), "folder" or "hub".
        place: the preset's name, the folder, or the hub id.
    """

    name: str
    kind: Literal["preset", "folder", "hub"]
    place: str

    @property
    def is_pipeline(self) -> bool:
        """Whether it's a whole pipeline, not a single model (a hub id is taken for one)."""
        if self.kind == "folder":
            return (Path(self.place) / "model_index.json").exists()
        return self.kind == "hub"

    def load(self, dtype: torch.dtype | None = None, device: Any = "cpu") -> Any:
        """The model or pipeline, in eval mode.

        Raises:
            InputError: it's damaged, or the hub can't be reached or has no such model.
        """
        if self.kind == "preset":
            return presets.build(self.place, device, dtype)
        from pared.checkpoint import load

        with _quiet_diffusers() if self.name.startswith("house:") else nullcontext():
            return load(self.folder(), dtype, device)

    def folder(self) -> Path:
        """The local folder, downloaded where a model of the hub isn't cached (not for presets)."""
        return _fetched(self.place) if self.kind == "hub" else Path(self.place)

    def model_folder(self) -> Path:
        """As `folder`, of a single model that transformers saved, such as a recogniser.

        Raises:
            InputError: it's a preset, or the hub can't be reached or has no such model.
        """
        if self.kind == "preset":
            raise InputError(
                f"{self.name} is a configuration with random weights; give a trained model."
            )
        return _fetched_model(self.place) if self.kind == "hub" else Path(self.place)

    def without_weights(self) -> str:
        """What tells the model's shape without loading or downloading it: a preset or a folder.

        Raises:
            InputError: a hub id that is neither a preset's nor in the cache.
        """
        if self.kind != "hub":
            return self.name
        for name in presets.names():
            if presets.get(name).hub == self.place:
                return name
        if (folder := _cached(self.place)) is not None:
            return str(folder)
        raise InputError(
            f"{self.place} isn't in this machine's cache, and nothing is downloaded for a bill; "
            f"give one of the presets {', '.join(presets.names())}."
        )

    def require_pipeline(self, purpose: str) -> None:
        """Refuse a bare denoiser.

        Args:
            purpose: why a pipeline is needed, as the end of a sentence.
        """
        if not self.is_pipeline:
            what = (
                "a configuration with random weights" if self.kind == "preset" else "a single model"
            )
            raise InputError(
                f"{self.name} is {what}; {purpose} needs a whole pipeline, such as house:pixart."
            )


class ModelName(click.ParamType):
    """A MODEL, completed from house models, presets and folders."""

    name = "model"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        # In the order of kinds; the shell adds the folders itself.
        names = [name for name in _named() if name.startswith(incomplete)]
        return [*map(CompletionItem, names), CompletionItem(incomplete, type="dir")]


def locate(name: str) -> Source:
    """Find a model without loading anything. Needs no torch.

    Raises:
        InputError: there is no such model; the message names the nearest.
    """
    if name.startswith("house:"):
        return Source(name, "folder", house.folder_of(name))
    if name in presets.names():
        return Source(name, "preset", name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / index).exists() for index in ("model_index.json", "config.json")):
            raise InputError(
                f"{name} is no model: it has neither a model_index.json nor a config.json."
            )
        return Source(name, "folder", str(path))
    if path.exists():
        raise InputError(f"{name} is a file; give the folder of a model.")
    # With a folder `runs` here, `runs/studnet` is a slip in a path and nothing to ask the hub for.
    if HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return Source(name, "hub", name)
    raise InputError(_unknown(name, path))


def config_of(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a model's folder; empty where there is none.

    Raises:
        InputError: it can't be read.
    """
    try:
        return cast(dict[str, Any], json.loads((folder / name).read_text()))
    except FileNotFoundError:  # not every pipeline has every part
        return {}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / name} can't be read ({error}); copy the model again."
        ) from None


def _named() -> list[str]:
    """Models with a name of their own."""
    return [f"house:{model}" for model in house.names()] + list(presets.names())


def _unknown(name: str, path: Path) -> str:
    parent = path.parent
    beside = (
        [str(parent / p.name) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    )
    near = difflib.get_close_matches(name.lower(), [*_named(), *beside], n=2, cutoff=0.5)
    if near:
        return f"there is no model {name!r}; did you mean {' or '.join(near)}?"
    return (
        f"there is no model {name!r}; give a folder, a hub id (owner/name), or one of "
        f"{', '.join(_named())}."
    )


def _fetched(hub_id: str) -> Path:
    """The local folder of a pipeline on the hub, downloaded where it isn't cached."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE and _cached(hub_id) is None:  # known without the slow import below
        raise InputError(
            f"{hub_id} isn't in this machine's cache and HF_HUB_OFFLINE is set; give a folder, or "
            "unset it to download."
        )
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    from pared.checkpoint import SIDECAR

    try:
        with _quiet_diffusers():  # what it warns of is said below, once
            folder = DiffusionPipeline.download(hub_id, use_safetensors=True)
    except (OSError, ValueError, HfHubHTTPError):
        raise InputError(
            f"{hub_id} can't be had: it isn't in this machine's cache, and the hub has no such "
            "pipeline or can't be reached; check the name, or give a folder."
        ) from None
    # Of a converted model the weights fit only together with its sidecar. The cache also remembers
    # that a model has none; only where it knows nothing is the hub asked.
    if try_to_load_from_cache(hub_id, SIDECAR) is None:
        with suppress(EntryNotFoundError, HfHubHTTPError):
            hf_hub_download(hub_id, SIDECAR)
    return Path(folder)


def _fetched_model(hub_id: str) -> Path:
    """The local folder of a single model on the hub, downloaded where it isn't cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        found = snapshot_download(hub_id, allow_patterns=MODEL_FILES, ignore_patterns=OTHER_FILES)
    except (OSError, ValueError, HTTPError):
        raise InputError(
            f"{hub_id} can't be had: it isn't in this machine's cache, and the hub has no such "
            "model or can't be reached; check the name, or give a folder."
        ) from None
    return Path(found)


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Within the context diffusers' warnings are held back."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _cached(hub_id: str) -> Path | None:
    """The local folder of a pipeline that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(hub_id, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None
