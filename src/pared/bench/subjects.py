"""What is measured: a whole pipeline on fixed noise, or one call of a bare denoiser."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from pared import anatomy, method
from pared.anatomy import presets
from pared.anatomy.dit import STOCK_NULL
from pared.bench.metering import Count
from pared.errors import InputError
from pared.guidance.guidance_distillation import GuidanceDistillation, one_pass

# Captions of the emoji world (two of them held out) that make sense to any text-to-image model.
PROMPTS = (
    "woman firefighter: dark skin tone",
    "red apple",
    "raised fist: dark skin tone",
    "sailboat",
)
# The same for models of the thousand classes of ImageNet: a golden retriever, a sea otter ...
CLASSES = (207, 360, 387, 974)

Known = presets.Preset | presets.SpeechPreset


@dataclass(frozen=True)
class Sample:
    """One picture to paint: its prompt, and the seed of its own noise, whatever the batch."""

    prompt: Any
    seed: int


class Subject(ABC):
    """Something that can be run again and again, with another denoiser if need be.

    Attributes:
        paints: whether a run gives pictures.
        steps: of a run, or None where it has none.
    """

    paints: bool
    steps: int | None

    @property
    @abstractmethod
    def target(self) -> Any:
        """What run-time methods attach to."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The denoiser."""

    @abstractmethod
    def with_model(self, model: nn.Module) -> Subject:
        """The same with another denoiser; this one stays as it is."""

    @abstractmethod
    def run(self, steps: int | None = None) -> Any:
        """One whole call, the unit of time; with another number of steps if given."""

    def paint(self, samples: Sequence[Sample], steps: int | None = None) -> Tensor:
        """Pictures (len(samples), 3, height, width) in [0, 1], float32 on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} paints nothing")

    @abstractmethod
    def denoiser_call(self, counted: Count) -> Callable[[], Any] | None:
        """A repetition of the denoiser's first call, or None where that is the whole run."""


class PipelineSubject(Subject):
    """A diffusers pipeline.

    Works on a shallow copy of the pipeline: the components are shared, but the bench can silence
    its progress bar and swap its denoiser without the user's pipeline noticing.

    Args:
        pipeline: text-to-image, or class-to-image.
        samples: pictures to paint; a timed run paints the first.
        call: further arguments of the pipeline's call.
    """

    paints = True

    def __init__(self, pipeline: Any, samples: Sequence[Sample], call: dict[str, Any]) -> None:
        self._pipeline = copy.copy(pipeline)
        self._pipeline.set_progress_bar_config(disable=True)
        self.samples, self._call = tuple(samples), dict(call)
        accepted = inspect.signature(type(pipeline).__call__).parameters
        known = [name for name in ("prompt", "class_labels") if name in accepted]
        if not known:
            raise InputError(
                f"{type(pipeline).__name__} takes neither a prompt nor class labels; the bench "
                "runs pipelines that paint from one of these."
            )
        self._prompt_name = known[0]
        if "num_frames" in accepted:
            raise InputError(
                f"{type(pipeline).__name__} makes videos, and the bench compares pictures; give it "
                "the transformer, whose calls it times."
            )
        if unknown := [name for name in call if name not in accepted]:
            raise InputError(f"{type(pipeline).__name__} takes no {unknown[0]!r}; leave it out.")
        if "use_resolution_binning" in accepted:
            # The nearest published size instead of the one asked for would be another bench.
            self._call.setdefault("use_resolution_binning", False)
        if "clean_caption" in accepted and not (is_bs4_available() and is_ftfy_available()):
            # What the pipeline falls back to, with a warning at every call.
            self._call.setdefault("clean_caption", False)
        default = getattr(accepted.get("num_inference_steps"), "default", None)
        self.steps = self._call.pop("num_inference_steps", default)
        require_null_class(self._pipeline, self._call)

    @property
    def target(self) -> Any:
        return self._pipeline

    @property
    def model(self) -> nn.Module:
        return method.denoiser(self._pipeline)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call, beside what is painted and the number of steps."""
        return dict(self._call)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the arguments that can stand in a report."""
        return {k: v for k, v in self._call.items() if isinstance(v, (str, int, float, bool))}

    def with_model(self, model: nn.Module) -> PipelineSubject:
        twin = copy.copy(self)
        twin._pipeline = copy.copy(self._pipeline)
        name = next(k for k, part in self._pipeline.components.items() if part is self.model)
        setattr(twin._pipeline, name, model)
        require_null_class(twin._pipeline, self._call)
        return twin

    def with_pipeline(self, pipeline: Any) -> PipelineSubject:
        """The same pictures from another pipeline."""
        call = self._call | ({} if self.steps is None else {"num_inference_steps": self.steps})
        accepted = inspect.signature(type(pipeline).__call__).parameters
        for name in ("use_resolution_binning", "clean_caption"):  # which the constructor set
            if name not in accepted:
                call.pop(name, None)
        return PipelineSubject(pipeline, self.samples, call)

    def paint(self, samples: Sequence[Sample], steps: int | None = None) -> Tensor:
        steps = steps or self.steps
        count = {} if steps is None else {"num_inference_steps": steps}
        with torch.no_grad(), _inputs_restored(self.model):
            output = self._pipeline(
                **{self._prompt_name: [sample.prompt for sample in samples]},
                generator=[torch.Generator().manual_seed(sample.seed) for sample in samples],
                output_type="np",
                **count,
                **one_pass(self._pipeline, **self._call),
            )
        images = torch.as_tensor(output.images, dtype=torch.float32)
        return images.permute(0, 3, 1, 2).contiguous()

    def run(self, steps: int | None = None) -> Tensor:
        return self.paint(self.samples[:1], steps)

    def denoiser_call(self, counted: Count) -> Callable[[], Any] | None:
        if counted.arguments is None:
            return None
        args, kwargs = counted.arguments

        def call() -> Any:
            with torch.no_grad():
                return self.model(*args, **kwargs)

        return call


@contextmanager
def _inputs_restored(model: nn.Module) -> Iterator[None]:
    """What was put into a model's inputs by hand is back there at the end."""
    inputs = list(getattr(anatomy.unwrap(model), "pared_inputs", {}).values())
    before = [dict(vars(each)) for each in inputs]
    try:
        yield
    finally:
        for each, held in zip(inputs, before, strict=True):
            vars(each).update(held)


class ModelSubject(Subject):
    """A bare denoiser on random inputs: speed alone.

    Args:
        model: the denoiser.
        height: of the latents; by default the model's own sample size.
        width: likewise.
        text_tokens: length of the prompt; by default the family's.
        steps: calls in a run, at timesteps that fall from 999, so that methods which reuse work
            across steps have something to reuse.
    """

    paints = False

    def __init__(
        self,
        model: nn.Module,
        height: int | None = None,
        width: int | None = None,
        text_tokens: int | None = None,
        steps: int | None = None,
    ) -> None:
        self._model, self.steps = model, steps
        self._example = anatomy.of(model).example(
            height=height,
            width=width,
            text_tokens=text_tokens,
            generator=torch.Generator().manual_seed(0),
        )
        self.size = tuple(self._example[0].shape[-2:])

    @property
    def target(self) -> Any:
        return self._model

    @property
    def model(self) -> nn.Module:
        return self._model

    def with_model(self, model: nn.Module) -> ModelSubject:
        twin = copy.copy(self)
        twin._model = model
        return twin

    def run(self, steps: int | None = None) -> Tensor:
        latents, timestep, condition = self._example
        family, count = anatomy.of(self._model), steps or self.steps or 1
        with torch.no_grad():
            for step in range(count):
                now = (
                    timestep if count == 1 else torch.full_like(timestep, 999 * (1 - step / count))
                )
                output = family.denoise(self._model, latents, now, condition)
        return output

    def denoiser_call(self, counted: Count) -> Callable[[], Any] | None:
        if (self.steps or 1) == 1:
            return None
        return lambda: self.run(steps=1)


# Finding out what the user means ----------------------------------------------------------------


def usual_prompts(pipeline: Any) -> tuple[Any, ...]:
    """What to paint when nobody says: captions, or class labels where the pipeline takes those."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if "class_labels" not in accepted:
        return PROMPTS
    count = getattr(method.denoiser(pipeline).config, "num_embeds_ada_norm", None) or 1000
    if count > max(CLASSES):
        return CLASSES
    return tuple(sorted({number * count // len(CLASSES) for number in range(len(CLASSES))}))


def require_null_class(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Refuse guidance by a class that isn't the null class.

    Args:
        pipeline: of diffusers; one that takes no classes passes.
        call: arguments of its call; without a guidance_scale the pipeline's own holds.

    Raises:
        InputError: the stock pipeline would guide by another class, or by none that there is.
    """
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if not {"class_labels", "guidance_scale"} <= accepted.keys():
        return
    model = method.denoiser(pipeline)
    scale = call.get("guidance_scale", accepted["guidance_scale"].default)
    # A student of guidance is called without.
    student = any(isinstance(step, GuidanceDistillation) for step in method.stack_of(model))
    if scale <= 1 or student or anatomy.of(model).stock_null:
        return
    count = model.config.num_embeds_ada_norm
    raise InputError(
        f"{type(pipeline).__name__} guides by class {STOCK_NULL}, which of this model's {count} "
        "classes isn't the empty one; give a guidance scale of 1, which is none."
    )


def open_target(given: Any, device: str | None) -> tuple[Any, Known | None]:
    """A pipeline or model from what was given.

    Args:
        given: a pipeline, a model, a preset's name, a folder or `house:NAME`.
        device: where to put what is built here; objects stay where they are.

    Returns:
        The pipeline or model, and the preset if it is one (then its weights are random).

    Raises:
        InputError: there is nothing of that name, or the object lies on another device.
    """
    if isinstance(given, (str, Path)):
        if isinstance(given, str) and given in presets.names():
            return _random(given, device), presets.get(given)
        from pared import checkpoint
        from pared.worlds.house import folder_of

        folder = folder_of(str(given))
        if not Path(folder).is_dir():
            presets.get(str(given))  # says which presets there are, and which is near
        return checkpoint.load(folder, device=device or "cpu"), None
    model: Any = method.denoiser(given)
    has = device_of(model)
    if has.type == "meta":
        raise InputError("the model lies on the meta device and can't be run; use pared.bill.")
    if model is given and next(model.parameters()).device.type == "meta":
        raise InputError(
            "the denoiser's weights are fetched layer by layer when they are needed, and the bench "
            "finds no device for the inputs that it makes; give it the whole pipeline, or the "
            "denoiser without that offloading."
        )
    if device is not None and torch.device(device).type != has.type:
        raise InputError(f"the model lies on {has}; move it with .to({str(device)!r}) first.")
    return given, None


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, wherever offloading leaves its weights between two calls."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)  # of accelerate
        if (place := getattr(hook, "execution_device", None)) is not None:
            return torch.device(place)
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and (group := registry.get_hook("group_offloading")) is not None:
            return torch.device(group.config.onload_device)
    return next(model.parameters()).device


def _random(name: str, device: str | None) -> nn.Module:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    half = torch.bfloat16 if torch.device(device).type == "cuda" else None
    return presets.build(name, device=device, dtype=half)


def subject_of(
    target: Any,
    preset: Known | None,
    samples: Sequence[Sample],
    call: dict[str, Any],
) -> Subject:
    """The subject behind a pipeline or model.

    Args:
        target: from `open_target`.
        preset: likewise.
        samples: pictures to paint, for pipelines.
        call: arguments of the pipeline's call; of a bare denoiser `height` and `width` (in latent
            pixels; for a preset in pixels) and `num_inference_steps`.

    Raises:
        InputError: an argument means nothing here.
    """
    if hasattr(target, "components"):
        return PipelineSubject(target, samples, call)
    if (kind := anatomy.of(target).kind) != "denoiser":
        raise InputError(
            f"a {type(anatomy.unwrap(target)).__name__} is a {kind}; the bench runs pipelines and "
            "denoisers of diffusion models."
        )
    call = dict(call)
    steps, size = call.pop("num_inference_steps", None), {}
    for side in ("height", "width"):
        value = call.pop(side, None)
        if preset is not None:
            pixels = value or getattr(preset, side)
            if pixels % preset.vae_scale:
                raise InputError(
                    f"the {side} of {preset.name} can't be {pixels}; it must be a multiple of "
                    f"{preset.vae_scale} pixels."
                )
            value = pixels // preset.vae_scale
        size[side] = value
    if call:
        raise InputError(
            f"a bare denoiser has no {next(iter(call))!r}; give it steps, height and width only."
        )
    tokens = preset.text_tokens if preset else None
    return ModelSubject(target, **size, text_tokens=tokens or None, steps=steps)
