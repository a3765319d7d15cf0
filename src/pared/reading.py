"""What a call of the denoiser tells about the run that it belongs to.

A timestep may lie on a device, which would have to finish all its work before the number could be
read. Most pipelines hand on an entry of their scheduler's `timesteps` as it is: it is known by its
place in that tensor's memory, and the tensor is read once for each run. Those that calculate with
it first (FLUX, Lumina) make the host wait once for each call.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.anatomy.denoiser import Denoiser

# Shape, type and device of every tensor of a call.
Shapes = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]

# Arguments of denoisers that say what to paint, and how closely to keep to it.
CONDITION = (
    "encoder_hidden_states",
    "encoder_hidden_states_image",
    "encoder_attention_mask",
    "encoder_mask",
    "class_labels",
    "pooled_projections",
    "added_cond_kwargs",
    "attention_kwargs",
    "cross_attention_kwargs",
    "joint_attention_kwargs",
    "guidance",
    "timestep_cond",
)


# Schedules ----------------------------------------------------------------------------------------


class Schedule:
    """The timesteps of a scheduler as they were set for a run.

    Args:
        timesteps: the scheduler's own tensor, (steps,).
        family: of the denoiser.
    """

    def __init__(self, timesteps: Tensor, family: Denoiser) -> None:
        self.timesteps, self._family = timesteps, family
        self._told: dict[torch.dtype, tuple[list[float], float]] = {}

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def numbers(self) -> list[float]:
        """The timesteps, read from their device."""
        return self.timesteps.tolist()

    def place(self, timestep: Tensor) -> int | None:
        """Which entry a timestep is, by its place in memory; None where it isn't one of them."""
        own = self.timesteps
        if timestep.dtype != own.dtype or not _is_one(timestep):
            return None
        if timestep.untyped_storage()._cdata != own.untyped_storage()._cdata:
            return None
        distance = timestep.storage_offset() - own.storage_offset()
        place, rest = divmod(distance, own.stride(0))
        return place if rest == 0 and 0 <= place < len(self) else None

    def rivals(self, timestep: Tensor) -> bool:
        """Whether a timestep that isn't one of these is an entry of a schedule of another length.

        One of the same length may be a copy of this one, on another device, say.
        """
        stored = timestep.untyped_storage().nbytes() // timestep.element_size()
        return _is_one(timestep) and self.place(timestep) is None and stored not in (1, len(self))

    def fits(self, place: int, time: float, dtype: torch.dtype) -> bool:
        """Whether the denoiser is told that time at an entry, but for errors of rounding.

        Args:
            place: of the entry; there is none behind the last.
            time: as it is told, falling.
            dtype: in which the pipeline calculates.
        """
        told, rounding = self._told_in(dtype)
        return place < len(self) and abs(told[place] - time) <= rounding

    def nearest(self, time: float, dtype: torch.dtype, likely: int | None) -> int | None:
        """The entry at which the denoiser is told that time; None where there is none.

        Args:
            time: as it is told, falling.
            dtype: in which the pipeline calculates; in half precision several entries may fit.
            likely: the entry to take where it fits.
        """
        fitting = [place for place in range(len(self)) if self.fits(place, time, dtype)]
        if likely in fitting:
            return likely
        told, _ = self._told_in(dtype)
        return min(fitting, key=lambda place: abs(told[place] - time), default=None)

    def repeats(self, dtype: torch.dtype) -> bool:
        """Whether some entry is told like the one before, by a pipeline calculating in `dtype`."""
        told, _ = self._told_in(dtype)
        return any(some == other for some, other in zip(told[1:], told, strict=False))

    def _told_in(self, dtype: torch.dtype) -> tuple[list[float], float]:
        """What the denoiser is told at each entry, falling, and how much rounding may change it."""
        if dtype not in self._told:
            given = torch.tensor(self.numbers, dtype=self.timesteps.dtype).to(dtype)
            told = ((-1 if self._family.rising else 1) * self._family.told(given)).tolist()
            eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0
            # Of calculating in another order, on another device: one rounding more or less.
            self._told[dtype] = told, 2 * eps * max(map(abs, told))
        return self._told[dtype]


def _is_one(timestep: Tensor) -> bool:
    """Whether it is one number in memory, however many times it's shown."""
    shown = zip(timestep.shape, timestep.stride(), strict=True)
    return all(size == 1 or stride == 0 for size, stride in shown)


# Calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What the clock reads from one call of the denoiser.

    Attributes:
        time: the timestep, falling; the largest where tokens or samples have their own.
        timestep: as it came.
        latents: the denoiser's first argument.
        tensors: all arguments that are tensors.
        shapes: of all tensors among the arguments, in dictionaries and tuples too.
        settings: numbers, texts and truths among the arguments, in dictionaries too, and which
            adapters are at work.
        condition: the tensors that say what to paint.
    """

    time: float
    timestep: Tensor
    latents: Tensor
    tensors: tuple[Tensor, ...]
    shapes: Shapes
    settings: tuple[Any, ...]
    condition: tuple[Tensor, ...]

    @property
    def rounding(self) -> torch.dtype:
        """The type in which the timestep came."""
        return self.timestep.dtype

    def continues(self, before: "Reading") -> bool:
        """Whether what the step before kept is of use: the same settings, prompts and classes."""
        return self.settings == before.settings and equal(self.condition, before.condition)

    def repeats(self, first: "Reading") -> bool:
        """Whether the call is another one's repetition, all tensors included."""
        return equal(self.tensors, first.tensors)


def read(
    model: nn.Module, latents: str, given: dict[str, Any], schedules: list[Schedule], rising: bool
) -> Reading:
    """Read a call.

    Args:
        model: the denoiser.
        latents: name of the argument that has them.
        given: the call's arguments.
        schedules: in one of which the timestep may be found.
        rising: whether the model's own timestep rises during a run: it is read with its sign
            turned.
    """
    timestep = torch.as_tensor(given["timestep"])
    time = _time(timestep, schedules, -1 if rising else 1)
    tensors = tuple(filter(is_tensor, given.values()))
    shapes = tuple((x.shape, x.dtype, x.device) for x in filter(is_tensor, tree_leaves(given)))
    settings = _settings({name: value for name, value in given.items() if name != "timestep"})
    told = [given.get(name) for name in CONDITION]
    condition = tuple(filter(is_tensor, tree_leaves(told)))
    at_work = (*settings, *_adapters(model))
    return Reading(time, timestep, given[latents], tensors, shapes, at_work, condition)


def _time(timestep: Tensor, schedules: list[Schedule], sign: int) -> float:
    for schedule in schedules:
        place = schedule.place(timestep)
        if place is not None:
            return sign * schedule.numbers[place]
    return float((sign * timestep).max())  # where the host waits


def _adapters(model: nn.Module) -> Iterator[Any]:
    """What peft has in the model, which of it is at work, and how strongly."""
    # Whoever puts adapters in leaves their configuration on the model.
    if not getattr(model, "peft_config", None):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            scales = getattr(layer, "scaling", {})
            yield layer.disable_adapters, *layer.active_adapters, *layer.merged_adapters
            yield tuple(scales.items())


def _settings(given: Any) -> Iterable[Any]:
    """The numbers, texts and truths in nested dictionaries, lists and tuples, in order."""
    if isinstance(given, dict):
        for name, value in given.items():
            yield from ((name, found) for found in _settings(value))
    elif isinstance(given, (list, tuple)):
        for value in given:
            yield from _settings(value)
    elif isinstance(given, (bool, int, float, str)):
        yield given


def is_tensor(given: Any) -> bool:
    """Whether something is a tensor."""
    return isinstance(given, Tensor)


def equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether there are as many tensors here as there, and all are alike."""
    if len(some) != len(others):
        return False
    return all(a is b or torch.equal(a, b) for a, b in zip(some, others, strict=True))
