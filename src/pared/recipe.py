"""Recipes: a whole training in one TOML file, from the model's configuration to the last stage.

name = "house-pixart"
[model]
class = "diffusers.PixArtTransformer2DModel"      # built from `config`
config = { ... }
[data]
source = "emoji"
[objective]
name = "denoising"
[[stages]]                                        # one or more; each starts from the one before
size = 32
training = { steps = 2000, batch_size = 64, learning_rate = 1e-3, ema = 0.999 }
"""

import difflib
import importlib
import inspect
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pared.errors import InputError
from pared.training.settings import TrainingSettings
from pared.worlds.emoji.world import STORED_SIZE

# What a recipe's model may be of.
LIBRARIES = ("diffusers", "transformers")


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class ModelTable(_Table):
    """What is trained: a class with its configuration, built with seeded random weights."""

    class_: str = Field(alias="class", description="dotted path, e.g. diffusers.AutoencoderKL")
    config: dict[str, Any] = {}
    seed: int = 0


class DataTable(_Table):
    """What it is trained on."""

    source: Literal["emoji"] = "emoji"
    kind: Literal["image-text", "images", "latents"]
    split: str | None = "train"
    vae: str | None = None
    text_encoder: str | None = None
    drop: float = Field(
        default=0.1, ge=0, le=1, description="chance of training without the prompt"
    )

    @model_validator(mode="after")
    def _encoders(self) -> "DataTable":
        if self.kind == "latents" and not (self.vae and self.text_encoder):
            raise ValueError("kind 'latents' needs a vae and a text_encoder, e.g. house:vae")
        return self


class ObjectiveTable(_Table):
    """How it is trained: an objective by name, with its arguments."""

    name: Literal["contrastive", "autoencoding", "denoising"]
    settings: dict[str, Any] = {}


class Stage(_Table):
    """One stage of a progressive training, at one image size in pixels."""

    size: int = Field(ge=8)
    training: TrainingSettings
    objective: dict[str, Any] = Field(default={}, description="changes to the objective's settings")


class Recipe(_Table):
    """A training run as a file."""

    name: str
    about: str = ""
    model: ModelTable
    data: DataTable
    objective: ObjectiveTable
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sizes(self) -> "Recipe":
        if (largest := max(stage.size for stage in self.stages)) > STORED_SIZE:
            raise ValueError(f"size {largest} is beyond the emoji world's {STORED_SIZE} pixels")
        return self


def read(path: str | Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        InputError: no such file, not TOML, or a bad or unknown field; the message names it.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({error.strerror}); give the path of a recipe file."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from None
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise InputError(f"{path}: {where or 'recipe'}: {message}.") from None


def check(recipe: Recipe) -> None:
    """Refuse what only the libraries can tell: the model's class and configuration, the objective.

    Raises:
        InputError: one of these can't be; the message names it.
    """
    _model_class(recipe.model)
    for stage in recipe.stages:
        _objective(recipe.objective, stage.objective)


def build(table: ModelTable):
    """The model of a recipe with seeded random weights."""
    import torch

    cls = _model_class(table)
    torch.manual_seed(table.seed)
    if hasattr(cls, "from_config"):
        return cls.from_config(table.config)
    return cls(cls.config_class(**table.config))


def _model_class(table: ModelTable) -> type:
    """The class that a recipe names, once its configuration is known to fit."""
    import torch

    module, _, name = table.class_.rpartition(".")
    # A recipe comes from anywhere: it names models, and must not get other code to run.
    cls = getattr(importlib.import_module(module), name, None) if module in LIBRARIES else None
    if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
        raise InputError(
            f"there is no model class {table.class_!r}; give one such as diffusers.AutoencoderKL."
        )
    # The libraries would ignore unknown entries; but a slip must not train another model.
    if hasattr(cls, "from_config"):
        known = set(inspect.signature(cls.__init__).parameters)
    else:
        known = set(cls.config_class().to_dict())
    for key in table.config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out."
            raise InputError(f"{table.class_} has no configuration entry {key!r}; {hint}")
    return cls


def run(recipe: Recipe, folder: str | Path):
    """Train what a recipe describes; goes on by itself where an earlier run of it stopped.

    Args:
        recipe: see `read`.
        folder: takes one sub-folder per stage (checkpoints, log) and, at the end, `model`: an
            ordinary diffusers or transformers folder with the final (averaged) weights.

    Returns:
        The trained model, or None when the run was interrupted.
    """
    from pared.training import train

    folder = Path(folder)
    objectives = [_objective(recipe.objective, stage.objective) for stage in recipe.stages]
    model = build(recipe.model)
    for number, (stage, objective) in enumerate(
        zip(recipe.stages, objectives, strict=True), start=1
    ):
        data, companion = _data(recipe.data, stage.size)
        result = train(model, objective, data, stage.training, folder / f"stage-{number}")
        if not result.finished:
            return None
    if hasattr(model.config, "scaling_factor") and hasattr(data, "images"):
        set_scaling_factor(model, data.images)
    model.save_pretrained(folder / "model")
    if companion is not None:
        companion.save_pretrained(folder / "model")
    return model


def set_scaling_factor(vae, images, count: int = 512) -> None:
    """Write 1 / std of the latents into the configuration (Rombach et al. 2022, section 4.3.2)."""
    import torch

    with torch.no_grad():
        pixels = images[:count].float() / 127.5 - 1
        std = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)]).std()
    vae.register_to_config(scaling_factor=round(1 / float(std), 5))


def _objective(table: ObjectiveTable, changes: dict[str, Any]):
    from pared.objectives import autoencoding, contrastive, denoising

    classes = {
        "contrastive": contrastive.Contrastive,
        "autoencoding": autoencoding.Autoencoding,
        "denoising": denoising.Denoising,
    }
    try:
        return classes[table.name](**(table.settings | changes))
    except TypeError as error:
        raise InputError(f"the objective {table.name} can't be set so: {error}.") from None


def _data(table: DataTable, size: int):
    """The data at one image size, and the tokenizer to save beside the model, if there is one."""
    from pared.worlds import datasets, emoji
    from pared.worlds.house import folder_of

    world = emoji.load(split=None if table.split == "all" else table.split, size=size)
    if table.kind == "images":
        return datasets.ImageData(world.images), None
    if table.kind == "image-text":
        from pared.worlds.house.tokenizer import train_tokenizer

        tokenizer = train_tokenizer(emoji.load(size=None).captions)
        ids, mask = datasets.tokenize(tokenizer, world.captions)
        return datasets.ImageTextData(world.images, ids, mask), tokenizer
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        vae = AutoencoderKL.from_pretrained(folder_of(table.vae)).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder_of(table.text_encoder))
        text_encoder = CLIPTextModel.from_pretrained(folder_of(table.text_encoder)).eval()
    except OSError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"the vae or text_encoder of the data can't be had: {reason}.") from None
    return datasets.latent_data(
        vae, text_encoder, tokenizer, world.images, world.captions, table.drop
    ), None
