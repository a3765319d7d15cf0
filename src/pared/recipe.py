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

A recipe that begins with `extends = "other.toml"` holds only what differs from the other.
"""

import difflib
import importlib
import inspect
import re
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from pared import anatomy, checkpoint, info
from pared.errors import InputError
from pared.few_step import rounds
from pared.healing import student_of, task_of
from pared.method import Conversion, Model, convert, denoiser, parse, replace_denoiser, stack_of
from pared.training import TrainingSettings, train
from pared.training.precision import in_float32
from pared.training.processes import saved_once, to_accelerator
from pared.training.recomputing import check_recomputes
from pared.worlds import emoji, tasks
from pared.worlds.emoji.world import STORED_SIZE
from pared.worlds.house import folder_of
from pared.worlds.readers import read as read_images
from pared.worlds.speech.mixtures import Mixing
from pared.worlds.speech.sources import kinds_of

EMOJI = "emoji"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# The objectives that only methods have a use for.
HEALING = ("distillation", "guided", "explicit")
# The one that a stage may name where the recipe has another.
HALVING = "progressive"
# Those that learn from the model as it was.
TAUGHT = ("distillation", "guided", HALVING)
# Those that go with a denoiser's task.
OF_TASK = (*HEALING, HALVING, "denoising")
# What a recipe's model may be of; or one of pared's own.
LIBRARIES = ("diffusers", "transformers")


class Sound(NamedTuple):
    """A kind of data that is sound.

    Attributes:
        objective: the one that it goes with.
        trainer: dotted path of the module that trains on it, by its functions `check(recipe, cls)`
            and `run(recipe, folder, build)`.
        needs: what its source is to have, for messages.
    """

    objective: str
    trainer: str
    needs: str


# Kinds of data that have a use for a setting, of the settings that not all have a use for.
USED_BY = {
    "drop": ("latents", "tasks"),
    "balance": ("image-text", "images", "latents"),
    "vae": ("latents",),
    "text_encoder": ("latents",),
    "utterances": ("transcripts", "mixtures", "recordings"),
    "snr": ("transcripts",),
    "extractor": ("transcripts", "recordings"),
    "mixing": ("mixtures",),
    "seconds": ("mixtures", "recordings"),
    "noises": ("mixtures", "transcripts"),
}
SOUNDS = {
    "transcripts": Sound("ctc", "pared.speech.recognition.training", "transcripts"),
    "mixtures": Sound("enhancement", "pared.speech.streaming_pse.training", "voices"),
    "recordings": Sound("wav2vec2", "pared.speech.pretraining", "recordings"),
}


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class ModelTable(_Table):
    """What is trained: a class with its configuration, or a given model with methods applied."""

    class_: str | None = Field(
        default=None,
        alias="class",
        description="e.g. diffusers.UNet2DModel, or a method that is a model: pared.StreamingPSE",
    )
    config: dict[str, Any] = {}
    seed: int = Field(
        default=0, description="of random weights: the model's, or the methods' new ones"
    )
    from_: str | None = Field(
        default=None, alias="from", description="pipeline to start from: house:NAME or a folder"
    )
    methods: tuple[str, ...] = Field(default=(), description="specs of conversions, e.g. edit:r=8")

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelTable":
        if (self.class_ is None) == (self.from_ is None):
            raise ValueError("give either a class with its config or a pipeline to start from")
        return self


class PipelineTable(_Table):
    """The stock pipeline that a trained denoiser is packed into, with the encoders of its data."""

    class_: str = Field(alias="class", description="e.g. diffusers.PixArtSigmaPipeline")
    scheduler: str = Field(description="e.g. diffusers.DPMSolverMultistepScheduler")
    scheduler_config: dict[str, Any] = {}
    prompt_tokens: int | None = Field(
        default=None, ge=2, description="length that prompts are padded to; the tokenizer's own"
    )


class DataTable(_Table):
    """What it is trained on."""

    source: str = Field(
        default=EMOJI,
        description="emoji, or captioned images: a folder, .tar shards, parquet or a dataset; "
        "of sound speech:KIND+KIND, or a corpus: a folder or a dataset",
    )
    on_bad: Literal["refuse", "skip"] = Field(
        default="refuse", description="what to do with images or recordings that can't be used"
    )
    held: bool = Field(
        default=True,
        description="encode everything once and hold it; false encodes what is drawn, every time",
    )
    kind: Literal[
        "image-text", "images", "latents", "tasks", "transcripts", "mixtures", "recordings"
    ]
    tasks: dict[str, str] = Field(
        default={}, description="of kind tasks: for each task a source, emoji or your examples"
    )
    split: str | None = "train"
    vae: str | None = None
    text_encoder: str | None = None
    drop: float = Field(
        default=0.1, ge=0, le=1, description="chance of training without the prompt"
    )
    balance: float = Field(
        default=0,
        ge=0,
        le=1,
        description="0: every picture is as likely; 1: every base concept, however many variants",
    )
    utterances: dict[str, int] = Field(
        default={}, description="of kinds of the speech world; the others have their usual number"
    )
    snr: tuple[float, float] | None = Field(
        default=None, description="of noise among transcripts, in dB, least and greatest; no noise"
    )
    extractor: str = Field(
        default="transformers.Wav2Vec2FeatureExtractor",
        description="what makes a recogniser's inputs of sound",
    )
    mixing: Mixing = Field(default=Mixing(), description="how voices are mixed with others")
    seconds: float = Field(
        default=4.0, gt=0, description="length of mixtures, and at which recordings are cut"
    )
    noises: str | None = Field(
        default=None,
        description="a folder of noises to mix in, or the DNS challenge's, whose noises are taken",
    )


class ObjectiveTable(_Table):
    """How it is trained: an objective by name, with its arguments."""

    name: Literal[
        "contrastive", "autoencoding", "denoising", "distillation", "guided", "explicit", "ctc",
        "enhancement", "wav2vec2", "progressive",
    ]  # fmt: skip
    settings: dict[str, Any] = Field(
        default={}, description="over what the pipeline's scheduler and the methods say"
    )
    task: dict[str, Any] = Field(
        default={}, description="of the denoising that a distillation goes with, e.g. time_sampling"
    )


class Stage(_Table):
    """One stage of a progressive training."""

    size: int = Field(default=0, ge=8, description="of the images in pixels; sound has none")
    train: Literal["all", "methods"] = Field(
        default="all",
        description="what trains: all that training.trainable names; or of a pipeline to start "
        "from what the methods name",
    )
    training: TrainingSettings
    objective: dict[str, Any] = Field(
        default={},
        description="changes to the objective's settings; with a name, progressive, all of its own",
    )


class Recipe(_Table):
    """A training run as a file."""

    name: str
    about: str = ""
    model: ModelTable
    data: DataTable
    objective: ObjectiveTable
    stages: tuple[Stage, ...] = Field(min_length=1)
    pipeline: PipelineTable | None = None

    @model_validator(mode="after")
    def _encoders(self) -> "Recipe":
        encoders = self.data.vae and self.data.text_encoder and self.pipeline
        if self.data.kind == "latents" and not (self.model.from_ or encoders):
            raise ValueError(
                "kind 'latents' needs a vae, a text_encoder and a pipeline to encode with, "
                "e.g. house:vae and house:clip"
            )
        if self.objective.name in HEALING and not self.model.methods:
            raise ValueError(
                f"the objective {self.objective.name!r} trains methods, and the model has none"
            )
        others = ("denoising", "ctc", "wav2vec2")
        if self.model.methods and self.objective.name not in (*HEALING, *others):
            raise ValueError(
                f"methods are trained by the objectives {', '.join(HEALING)} or denoising"
            )
        if self.objective.task and self.objective.name not in OF_TASK:
            raise ValueError(
                f"the objective {self.objective.name!r} has no task; leave its task out"
            )
        return self

    @model_validator(mode="after")
    def _of_sound(self) -> "Recipe":
        for kind, sound in SOUNDS.items():
            if (self.data.kind == kind) != (self.objective.name == sound.objective):
                raise ValueError(
                    f"kind {kind!r} goes with the objective {sound.objective!r}, and only it does"
                )
        for stage in self.stages:
            if bool(stage.size) == (self.data.kind in SOUNDS):
                raise ValueError(
                    "stages of images have a size in pixels, e.g. size = 64; of sound none"
                )
        if self.data.kind in SOUNDS and self.data.source == EMOJI:
            raise ValueError("emoji say nothing; give a source such as speech:sentences")
        if self.data.noises is not None and self.data.kind == "transcripts" and not self.data.snr:
            raise ValueError("noises among transcripts need an snr, such as [5, 25]; give one")
        return self

    @model_validator(mode="after")
    def _of_use(self) -> "Recipe":
        for name, kinds in USED_BY.items():
            given = name in self.data.model_fields_set and getattr(self.data, name)
            if given and self.data.kind not in kinds:
                raise ValueError(
                    f"data of kind {self.data.kind!r} have no use for {name}, only "
                    f"{', '.join(kinds)}; leave {name} out"
                )
        begun = {
            "model.config": self.model.config,
            "data.vae": self.data.vae,
            "data.text_encoder": self.data.text_encoder,
            "pipeline": self.pipeline,
        }
        twice = [name for name, value in begun.items() if value]
        if twice and self.model.from_ and self.data.kind not in SOUNDS:
            raise ValueError(
                f"the pipeline to start from has its own; leave {' and '.join(twice)} out"
            )
        return self

    @model_validator(mode="after")
    def _of_tasks(self) -> "Recipe":
        if (self.data.kind == "tasks") != bool(self.data.tasks):
            raise ValueError("kind 'tasks' goes with a table [data.tasks], and only it does")
        if self.data.tasks and "drop" in self.data.model_fields_set and self.data.drop > 0:
            raise ValueError(
                "of kind tasks every task has its own chances of going without words or picture; "
                "leave drop out, or set it to 0 for none"
            )
        for name in self.data.tasks:
            tasks.get(name)
        if self.data.tasks and not self.model.from_:
            raise ValueError("tasks are taught to a pipeline; give one to start from")
        return self

    @model_validator(mode="after")
    def _of_halving(self) -> "Recipe":
        names = [self.objective_of(stage).name for stage in self.stages]
        if any(name not in (self.objective.name, HALVING) for name in names):
            raise ValueError(
                f"a stage has the objective of the recipe, {self.objective.name!r}, or names "
                f"{HALVING!r}"
            )
        if HALVING in names and not (self.model.from_ and self.data.kind == "latents"):
            raise ValueError(
                f"{HALVING!r} halves the steps of a pipeline on data of kind 'latents'; give that "
                "kind, and a pipeline to start from"
            )
        return self

    @model_validator(mode="after")
    def _of_methods_alone(self) -> "Recipe":
        whole = self.data.kind in SOUNDS or not self.model.from_
        if whole and any(stage.train == "methods" for stage in self.stages):
            raise ValueError(
                "train = 'methods' is for pipelines to start from; leave it out, and name what "
                "trains in training.trainable"
            )
        return self

    @model_validator(mode="after")
    def _of_emoji_alone(self) -> "Recipe":
        if EMOJI not in (self.data.tasks.values() or [self.data.source]):
            if self.data.balance:
                raise ValueError(
                    "only the emoji world knows concepts to balance; leave balance out"
                )
            if self.data.held is False and self.data.kind != "latents":
                raise ValueError("only latents are encoded as they are drawn; leave held out")
            return self
        if not self.data.held:
            raise ValueError("the emoji world is small enough to be held; leave held out")
        if (largest := max(stage.size for stage in self.stages)) > STORED_SIZE:
            raise ValueError(f"size {largest} is beyond the emoji world's {STORED_SIZE} pixels")
        return self

    def objective_of(self, stage: Stage) -> ObjectiveTable:
        """What a stage is trained by: the recipe's objective, changed, or one that it names."""
        changes = dict(stage.objective)
        name = changes.pop("name", None)
        settings = self.objective.settings | changes if name is None else changes
        update = {"name": name or self.objective.name, "settings": settings}
        return self.objective.model_copy(update=update)


def read(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: of the file.
        changes: entries to change, each as `stages.0.training.steps=10`: a dotted path, lists by
            number from 0, and a TOML value (text may go without quotes).

    Raises:
        InputError: no such file, not TOML, or a bad or unknown field; the message names it.
    """
    path = Path(path)
    table = _read_table(path)
    for change in changes:
        _set(table, change)
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise InputError(f"{path}: {where or 'recipe'}: {message}.") from None


def _read_table(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The entries of a file, laid over those of the file that it extends."""
    if path.resolve() in below:
        raise InputError(f"{path} extends itself; take one of the 'extends' out.")
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({error.strerror}); give the path of a recipe file."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from None
    if (base := table.pop("extends", None)) is None:
        return table
    if not isinstance(base, str):
        raise InputError(f"{path}: extends: give the path of one recipe, beside this one.")
    return _over(_read_table(path.parent / base, (*below, path.resolve())), table)


def _over(base: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """Entries of `table` laid over `base`: tables merge, everything else, stages too, replaces."""
    both = {k: _over(base[k], v) for k, v in table.items() if _is_table(v, base.get(k))}
    return base | table | both


def _is_table(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _set(table: dict[str, Any], change: str) -> None:
    """Carry out one change, e.g. `data.drop=0.2`, in place."""
    path, equals, text = change.partition("=")
    if not equals:
        raise InputError(f"{change!r} changes nothing; write PATH=VALUE, e.g. data.drop=0.2.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = path.strip().split(".")
    place: Any = table
    try:
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = value
    except (IndexError, ValueError, TypeError, AttributeError):
        raise InputError(
            f"{change!r} changes nothing: the recipe has no such place; write the path as in the "
            "file, e.g. stages.0.training.steps=10."
        ) from None


def check(recipe: Recipe) -> None:
    """Refuse what only the libraries can tell: model class and configuration, methods, objective.

    Raises:
        InputError: one of these can't be; the message names it.
    """
    cls = _model_class(recipe.model) if recipe.model.class_ else None
    if sound := SOUNDS.get(recipe.data.kind):
        _trainer(sound).check(recipe, cls)
    elif cls is None:
        place = folder_of(str(recipe.model.from_))
        if not (Path(place, "model_index.json").exists() or HUB_NAME.fullmatch(place)):
            raise InputError(
                f"there is no pipeline {recipe.model.from_!r}; give house:NAME, a folder, or "
                "OWNER/NAME on the hub."
            )
    if cls is not None and any(stage.training.gradient_checkpointing for stage in recipe.stages):
        check_recomputes(cls)
    for source in recipe.data.tasks.values() or [recipe.data.source]:
        found = "{" in source or HUB_NAME.fullmatch(source) or Path(source).expanduser().exists()
        if sound and not (found or kinds_of(source)):
            raise InputError(
                f"there are no {sound.needs} at {source!r}; give speech:sentences, a folder laid "
                "out as LibriSpeech or Common Voice, or a dataset's name."
            )
        if not sound and source != EMOJI and not found:
            raise InputError(
                f"there are no images at {source!r}; give emoji, a folder, .tar shards, a parquet "
                "file or a dataset's name."
            )
    methods = [parse(spec) for spec in recipe.model.methods]
    for stage in recipe.stages:
        table = recipe.objective_of(stage)
        _objective(table, methods=methods)
        if cls is not None and table.name in TAUGHT:
            raise InputError(
                f"the objective {table.name} learns from a teacher, and {recipe.model.class_} "
                "starts from random weights; start from a pipeline, with model.from."
            )


def steps_of(recipe: Recipe) -> int:
    """Optimizer steps of all stages."""
    total = 0
    for stage in recipe.stages:
        objective, each = _objective(recipe.objective_of(stage)), stage.training.steps
        total += objective.updates(each) if isinstance(objective, rounds.Rounds) else each
    return total


def _trainer(sound: Sound) -> ModuleType:
    return importlib.import_module(sound.trainer)


def build(table: ModelTable) -> Any:
    """The model of a recipe with seeded random weights."""
    cls = _model_class(table)
    torch.manual_seed(table.seed)
    if issubclass(cls, Model):
        return cls(**table.config).build()
    if hasattr(cls, "from_config"):
        return cls.from_config(table.config)
    return cls(cls.config_class(**table.config))


def _model_class(table: ModelTable) -> Any:
    """The class that a recipe names, once its configuration is known to fit."""
    for record in info.registry().values():
        if record.kind == "model" and table.class_ == f"pared.{record.cls}":
            method: Any = record.load()
            method(**table.config)
            return method
    cls: Any = _class(str(table.class_), nn.Module, "model class")
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


def run(recipe: Recipe, folder: str | Path) -> Any:
    """Train what a recipe describes; goes on by itself where an earlier run of it stopped.

    Args:
        recipe: see `read`.
        folder: takes one sub-folder per stage (checkpoints, log) and, at the end, `model`: an
            ordinary diffusers or transformers folder with the final (averaged) weights.

    Returns:
        The trained model or its pipeline, a recogniser where it's one; or None when the run was
        interrupted.
    """
    folder = Path(folder)
    check(recipe)
    if sound := SOUNDS.get(recipe.data.kind):
        return _trainer(sound).run(recipe, folder, build)
    if recipe.model.from_:
        return _go_on(recipe, folder)
    model = build(recipe.model)
    if methods := [cast(Conversion, parse(spec)) for spec in recipe.model.methods]:
        convert(model, *methods)
    pipeline = None if recipe.pipeline is None else pack(recipe.pipeline, recipe.data, model)
    if pipeline is not None:
        to_accelerator(pipeline)
    objectives = [
        _objective(recipe.objective_of(stage), pipeline, methods) for stage in recipe.stages
    ]
    for number, (stage, objective) in enumerate(
        zip(recipe.stages, objectives, strict=True), start=1
    ):
        data, companion = _data(recipe.data, stage.size, pipeline)
        if not train(model, objective, data, stage.training, folder / f"stage-{number}").finished:
            return None
    if recipe.objective.name == "autoencoding":
        set_scaling_factor(model, _world(recipe.data, recipe.stages[-1].size).images)
    if pipeline is not None:
        model.eval()
        saved_once(folder / "model", lambda place: checkpoint.save(pipeline, place))
        return pipeline
    parts = [part for part in (model, companion) if part is not None]
    saved_once(folder / "model", *(part.save_pretrained for part in parts))
    return model


def _go_on(recipe: Recipe, folder: Path) -> Any:
    """The case of a given pipeline: its denoiser is converted and healed, or trained on."""
    pipeline = to_accelerator(_opened(str(recipe.model.from_)))
    teacher = denoiser(pipeline)
    student = student_of(teacher)
    torch.manual_seed(recipe.model.seed)
    methods: list[Any] = [parse(spec) for spec in recipe.model.methods]
    convert(student, *methods)
    stack = stack_of(student)
    objectives = [_objective(recipe.objective_of(s), pipeline, stack) for s in recipe.stages]
    for objective in objectives:
        if isinstance(objective, rounds.Rounds):
            objective.bind(student, teacher)  # what can't be is refused before data are encoded
    for number, (stage, objective) in enumerate(
        zip(recipe.stages, objectives, strict=True), start=1
    ):
        data, _ = _data(recipe.data, stage.size, pipeline, stack_of(student))
        objective.bind(student, teacher, data)
        settings = stage.training
        if stage.train == "methods":
            family = anatomy.of(student)
            named = tuple(p for m in stack_of(student) for p in m.trainable(family))
            settings = settings.model_copy(update={"trainable": named})
        go = rounds.train if isinstance(objective, rounds.Rounds) else train
        with in_float32(student, teacher):
            run = go(student, objective, data, settings, folder / f"stage-{number}")
        if not run.finished:
            return None
    replace_denoiser(pipeline, student)
    if isinstance(objective, rounds.Rounds):
        objective.equip(pipeline)
    saved_once(folder / "model", lambda place: checkpoint.save(pipeline, place))
    return pipeline


def _opened(source: str) -> Any:
    """A pipeline to start from: a stock one, or one whose denoiser carries methods already."""
    from diffusers import DiffusionPipeline

    place = folder_of(source)
    if not Path(place).is_dir():
        try:
            place = DiffusionPipeline.download(place, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise InputError(f"the pipeline {source} can't be had: {reason}.") from None
    return checkpoint.load(place)


def pack(table: PipelineTable, data: DataTable, model: nn.Module) -> Any:
    """A stock pipeline around a denoiser, with the autoencoder and text encoder of its data.

    Every CLIP text encoder that the pipeline takes is the same one; a third one (T5), a safety
    checker and other optional parts are left out.
    """
    cls = _class(table.class_)
    parts: dict[str, Any] = {"scheduler": _class(table.scheduler)(**table.scheduler_config)}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in ("transformer", "unet"):
            parts[name] = model
        elif name == "vae":
            parts[name] = _part("diffusers.AutoencoderKL", data.vae).eval()
        elif name in ("tokenizer", "tokenizer_2"):
            parts[name] = _part("transformers.CLIPTokenizer", data.text_encoder)
            parts[name].model_max_length = table.prompt_tokens or parts[name].model_max_length
        elif name in ("text_encoder", "text_encoder_2"):
            pooled = "WithProjection" in str(parameter.annotation)
            encoder = "transformers.CLIPTextModel" + "WithProjection" * pooled
            parts[name] = _part(encoder, data.text_encoder).eval()
        elif parameter.default is parameter.empty:
            parts.setdefault(name, None)
    if "requires_safety_checker" in inspect.signature(cls).parameters:
        parts["requires_safety_checker"] = False
    return cls(**parts)


def _part(path: str, place: str | None) -> Any:
    """An encoder or tokenizer from a folder, the hub or the house."""
    try:
        return _class(path).from_pretrained(folder_of(str(place)))  # type: ignore[attr-defined]
    except OSError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"the vae or text_encoder of the data can't be had: {reason}.") from None


def _class(path: str, base: type = object, what: str = "class") -> type:
    # A recipe comes from anywhere: it names models, and must not get other code to run.
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module in LIBRARIES else None
    if not isinstance(found, type) or not issubclass(found, base):
        raise InputError(f"there is no {what} {path!r}; give one such as diffusers.AutoencoderKL.")
    return found


def set_scaling_factor(vae: Any, images: Tensor, count: int = 512) -> None:
    """Write 1 / std of the latents into the configuration (Rombach et al. 2022, section 4.3.2)."""
    with torch.no_grad():
        pixels = images[:count].to(vae.device).float() / 127.5 - 1
        std = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)]).std()
    vae.register_to_config(scaling_factor=round(1 / float(std), 5))


def _objective(table: ObjectiveTable, pipeline: Any = None, methods: Sequence[Any] = ()) -> Any:
    """The objective of a stage: its settings, over what pipeline and methods say.

    Args:
        table: name and settings.
        pipeline: its scheduler says the task; None where settings are only to be checked.
        methods: that the denoiser carries, the oldest first.
    """
    from pared.objectives import (
        autoencoding,
        contrastive,
        ctc,
        denoising,
        distillation,
        enhancement,
        explicit,
        guided,
        wav2vec2,
    )

    classes: dict[str, Any] = {
        "contrastive": contrastive.Contrastive,
        "autoencoding": autoencoding.Autoencoding,
        "distillation": distillation.Distillation,
        "guided": guided.Guided,
        "explicit": explicit.Explicit,
        "ctc": ctc.CTC,
        "enhancement": enhancement.Enhancement,
        "wav2vec2": wav2vec2.Wav2Vec2Pretraining,
        HALVING: rounds.Rounds,
    }
    task_from: Any = denoising.Denoising if pipeline is None else partial(task_of, pipeline)
    try:
        if table.name == "denoising":
            return task_from(**table.task | table.settings)
        cls = classes[table.name]
        if table.name not in OF_TASK:
            return cls(**table.settings)
        task = task_from(**table.task)
        return cls(**_healed(cls, methods, task) | table.settings, task=task)
    except TypeError as error:
        raise InputError(f"the objective {table.name} can't be set so: {error}.") from None


def _healed(cls: type, methods: Sequence[Any], task: Any) -> dict[str, Any]:
    """The settings of an objective by which the last method is healed whose paper has that one."""
    own = [found for m in methods if m.info.training and type(found := m.healing(task)) is cls]
    names = inspect.signature(cls).parameters.keys() - {"task"}
    return {name: getattr(own[-1], name) for name in names} if own else {}


def _world(table: DataTable, size: int) -> Any:
    """Something with `images` and `captions`: of the emoji world, or of the user's own."""
    if table.source == EMOJI:
        return emoji.load(split=None if table.split == "all" else table.split, size=size)
    from pared.worlds import datasets

    items = read_images(table.source, table.on_bad)
    captions = [item.caption for item in items]
    return SimpleNamespace(images=datasets.fitted(items, size), captions=captions)


def _data(
    table: DataTable, size: int, pipeline: Any, methods: Sequence[Any] = ()
) -> tuple[Any, Any]:
    """The data at one image size, and the tokenizer to save beside the model, if there is one."""
    from pared.worlds import datasets

    if table.tasks:
        return _of_tasks(table, size, pipeline, methods), None
    if not table.held:
        items = read_images(table.source, table.on_bad)
        return datasets.PipelineData(pipeline, items, size, table.drop), None
    world, tokenizer = _world(table, size), None
    data: Any
    if table.kind == "images":
        data = datasets.ImageData(world.images)
    elif table.kind == "latents":
        data = datasets.latents_of(pipeline, world.images, world.captions, table.drop)
    else:
        from pared.worlds.house.tokenizer import train_tokenizer

        known = emoji.load(size=None) if table.source == EMOJI else world
        tokenizer = train_tokenizer(known.captions)
        data = datasets.ImageTextData(world.images, *datasets.tokenize(tokenizer, world.captions))
    if table.balance:
        data = datasets.Balanced(data, datasets.balanced_weights(world.bases, table.balance))
    return data, tokenizer


def _of_tasks(table: DataTable, size: int, pipeline: Any, methods: Sequence[Any]) -> Any:
    """Examples of every task, under the numbers by which the model knows them."""
    from pared.tasks.data import TaskData
    from pared.tasks.sources import examples_of

    split = None if table.split == "all" else table.split
    examples = [
        examples_of(name, source, size, split, table.on_bad) for name, source in table.tasks.items()
    ]
    taught = [m.tasks for m in methods if hasattr(m, "tasks")]
    known = max(taught, key=len, default=tuple(table.tasks))
    return TaskData(pipeline, examples, drop=table.drop > 0, tasks=known)
