"""A pipeline's sampling loop, one step at a time, for what is learned along whole trajectories.

The steps are those of the stock pipeline: its scheduler, set as the pipeline sets it, with guidance
on a joint batch or, in models that take a guidance weight, by that. A point of a trajectory is a
value: stepping from it leaves it as it is, so that several ways can lead on from one point.
"""

import copy
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.method import denoiser, denoisers
from pared.runtime import Clock
from pared.training import generator_for

Condition = dict[str, Tensor]


@dataclass(frozen=True)
class Conditions:
    """What trajectories are conditioned by.

    Attributes:
        entries: as the family takes them, (count, ...), to be drawn from.
        null: the same for the unconditional pass, (1, ...).
    """

    entries: Condition
    null: Condition

    def __len__(self) -> int:
        return len(next(iter(self.entries.values())))

    def draw(self, count: int, generator: torch.Generator) -> Condition:
        """Some of them, with repetition, (count, ...)."""
        rows = torch.randint(len(self), (count,), generator=generator)
        return {name: entry[rows] for name, entry in self.entries.items()}


def conditions_of(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts and the empty prompt, encoded; all classes where the model takes classes.

    Args:
        pipeline: with its text encoders, where it has any.
        prompts: left aside by a model of classes.
    """
    family = anatomy.of(denoiser(pipeline))
    if family.label_tables:
        table = cast(nn.Embedding, family.model.get_submodule(family.label_tables[0]))
        labels = torch.arange(table.num_embeddings)
        return Conditions({"label": labels[:-1]}, {"label": labels[-1:]})
    encoded = family.encode(pipeline, ["", *prompts])
    return Conditions(
        {name: entry[1:] for name, entry in encoded.items()},
        {name: entry[:1] for name, entry in encoded.items()},
    )


def scheduler_for(pipeline: Any, steps: int, size: tuple[int, int]) -> Any:
    """A copy of a pipeline's scheduler, set as the stock pipeline sets it.

    Args:
        pipeline: of a family that pared knows.
        steps: that users ask for; schedulers of second order make more of them.
        size: height and width of the latents.
    """
    own = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    anatomy.of(denoiser(pipeline)).set_timesteps(own, steps, size)
    return own


@dataclass(frozen=True)
class Point:
    """Where a trajectory is.

    Attributes:
        latents: x, (batch, channels, [frames,] height, width) in float32.
        step: that comes next, from 0.
        scheduler: as it is here; multi-step ones remember what they were given.
        seed: of the noise that stochastic schedulers add.
    """

    latents: Tensor
    step: int
    scheduler: Any
    seed: int


class Trajectories:
    """The sampling loop of a pipeline.

    Args:
        pipeline: a stock pipeline of the family, or whatever has its denoiser and scheduler.
        steps: that users ask for.
        guidance: scale; 1 is none.
        size: height and width of the latents, of a video frames ahead of them; what isn't given is
            the model's own.

    Attributes:
        family: of the denoiser.
        steps: rounds of the loop.
        shape: of a sample's latents, (channels, [frames,] height, width).
        scheduler: at the beginning; never stepped.

    Raises:
        InputError: the pipeline has two denoisers.
    """

    def __init__(
        self,
        pipeline: Any,
        steps: int,
        guidance: float = 1.0,
        size: tuple[int, ...] | None = None,
    ) -> None:
        if len(denoisers(pipeline)) > 1:
            raise InputError(
                f"this {type(pipeline).__name__} has two denoisers, and its last steps run the "
                "second; only along runs of a single denoiser can be learned, of Wan 2.1, say."
            )
        self.family = anatomy.of(denoiser(pipeline))
        sides = dict(zip(("width", "height", "frames"), reversed(size or ()), strict=False))
        example = self.family.example(1, **sides, text_tokens=1, generator=torch.Generator())
        self.shape = tuple(example[0].shape[1:])
        self.scheduler = scheduler_for(pipeline, steps, self.shape[-2:])
        self.steps = len(self.scheduler.timesteps)
        self.guidance = guidance
        self._embedded = "guidance" in self.family.conditions
        self._joint = guidance != 1 and not self._embedded

    @property
    def device(self) -> torch.device:
        return cast(Any, self.family.model).device

    def condition(self, given: Condition, null: Condition) -> Condition:
        """What the denoiser is given at every step: with guidance a joint batch, null half last.

        Args:
            given: (batch, ...).
            null: (1, ...).
        """
        count = len(next(iter(given.values())))
        whole = given
        if self._joint:
            whole = {
                name: torch.cat([entry, null[name].expand(count, *entry.shape[1:])])
                for name, entry in given.items()
            }
        elif self._embedded:
            whole = given | {"guidance": torch.full((count,), self.guidance)}
        dtype = cast(Any, self.family.model).dtype
        return {
            name: entry.to(self.device, dtype if entry.is_floating_point() else None)
            for name, entry in whole.items()
        }

    def start(self, noise: Tensor, seed: int = 0) -> Point:
        """The beginning of a trajectory.

        Args:
            noise: white, (batch, channels, [frames,] height, width).
            seed: of the noise that stochastic schedulers add.
        """
        scale = getattr(self.scheduler, "init_noise_sigma", 1.0)
        latents = noise.to(self.device, torch.float32) * scale
        return Point(latents, 0, copy.deepcopy(self.scheduler), seed)

    def predict(self, point: Point, condition: Condition) -> Tensor:
        """The prediction at a point, guided, shaped like its latents and in float32."""
        time, z = point.scheduler.timesteps[point.step], point.latents
        if hasattr(point.scheduler, "scale_model_input"):
            z = point.scheduler.scale_model_input(z, time)
        z = z.to(cast(Any, self.family.model).dtype)
        if self._joint:
            z = torch.cat([z, z])
        times = time.to(self.device).expand(len(z))
        output = self.family.denoise(self.family.model, z, times, condition).float()
        if not self._joint:
            return output
        given, null = output.chunk(2)
        return null + self.guidance * (given - null)

    def move(self, point: Point, prediction: Tensor) -> Point:
        """The next point, after a step of the scheduler."""
        scheduler = copy.deepcopy(point.scheduler)
        extra = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = generator_for(point.seed, point.step)
        time = scheduler.timesteps[point.step]
        latents = scheduler.step(prediction, time, point.latents, **extra, return_dict=False)[0]
        return Point(latents.float(), point.step + 1, scheduler, point.seed)

    @torch.no_grad()
    def told(self, conditions: Conditions) -> tuple[float, ...]:
        """The timesteps of a run as the denoiser is told them, found by one call at each."""
        first = {name: entry[:1] for name, entry in conditions.entries.items()}
        condition = self.condition(first, conditions.null)
        point, found = self.start(torch.zeros(1, *self.shape)), list[float]()
        with ExitStack() as undo:
            clock = Clock(self.family.model, undo)
            clock.on_call = lambda: found.append(clock.reading.time)
            for step in range(self.steps):
                self.predict(Point(point.latents, step, point.scheduler, 0), condition)
        return tuple(found)
