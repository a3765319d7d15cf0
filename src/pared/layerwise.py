"""Which layers to convert: heal each by itself, see which ones the model misses least.

heal_layers(...)   one run that heals every converted attention alone
assemble(...)      the teacher with some of them in place
search(...)        the whole curve: quality against cost, from no layer to all

Nobody ships linear attention in every layer without having looked; here the look costs one healing
run, however many subsets are tried.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.healing import student_of
from pared.method import Conversion, convert, stack_of
from pared.objectives.denoising import Denoising, Noised, condition_of
from pared.objectives.layerwise import Layerwise
from pared.training import TrainingSettings, train
from pared.training.data import Dataset, generator_for


@dataclass(frozen=True)
class Choice:
    """One subset of layers.

    Attributes:
        layers: indices of the converted blocks, in the order in which they were taken.
        error: ||model - teacher||^2 / ||teacher||^2 of the prediction, on data that did not train.
        cost: of the denoiser, by the measure that was asked for.
        spec: what `pared convert --with` takes to make it.
    """

    layers: tuple[int, ...]
    error: float
    cost: float
    spec: str


@dataclass(frozen=True)
class Curve:
    """Subsets of layers from none to all, each with one layer more than the one before.

    Attributes:
        alone: the error of each layer when it is the only one converted, by block.
        choices: the subsets, the empty one first.
    """

    alone: dict[int, float]
    choices: tuple[Choice, ...]

    def within(self, error: float) -> Choice:
        """The cheapest subset whose error is at most `error`.

        Raises:
            InputError: the error is negative.
        """
        if error < 0:
            raise InputError(f"an error of {error:g} can't be; give 0 or more.")
        return min((c for c in self.choices if c.error <= error), key=lambda c: c.cost)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and text, ready for JSON."""
        return asdict(self) | {"alone": {str(block): error for block, error in self.alone.items()}}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=1)


def heal_layers(
    teacher: nn.Module,
    method: Conversion,
    data: Dataset,
    folder: str | Path,
    task: Denoising | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    **changes: Any,
) -> nn.Module | None:
    """A converted copy of the teacher whose layers were healed one by one, in a single run.

    Args:
        teacher: a denoiser; stays as it is.
        method: a conversion of attentions.
        data: see `pared.heal`.
        folder: takes checkpoints and the log; a run that was stopped goes on from there.
        task: what the denoiser predicts, for the noise that the layers see.
        on_step: called after each step with its number and mean loss.
        changes: training settings to change, e.g. `steps=200`.

    Returns:
        The student, or None when the run was interrupted.
    """
    device = next(teacher.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # a run that is done again draws its new weights again
        student = convert(student_of(teacher), method)
    objective = Layerwise(task).bind(student, teacher)
    if not objective.paths:
        raise InputError(
            f"{method.info.slug} converts no attention, so there is no layer to choose."
        )
    settings = TrainingSettings(
        steps=200, learning_rate=1e-3, trainable=method.trainable(anatomy.of(student))
    )
    settings = TrainingSettings(**(settings.model_dump() | changes))
    if settings.gradient_checkpointing:
        raise InputError(
            "layers that are healed one by one can't be run twice, as gradient_checkpointing does; "
            "leave it out."
        )
    run = train(student, objective, data, settings, folder, on_step)
    return student if run.finished else None


def assemble(
    teacher: nn.Module, healed: nn.Module, method: Conversion, layers: Sequence[int]
) -> nn.Module:
    """A copy of the teacher with some layers converted, carrying the weights of a healed student.

    Args:
        teacher: the denoiser that `healed` came from; stays as it is.
        healed: what `heal_layers` gave.
        method: the conversion, as it was healed.
        layers: indices of the blocks to convert; none gives a plain copy.
    """
    model = student_of(teacher).eval()
    if not layers:
        return model
    convert(model, method.model_copy(update={"layers": tuple(sorted(layers))}))
    family = anatomy.of(model)
    paths = {c.site for m in stack_of(model) for c in m.claims(family) if c.how == "replaces"}
    weights = healed.state_dict()
    wanted = {n: w for n, w in weights.items() if n.startswith(tuple(f"{p}." for p in paths))}
    model.load_state_dict(wanted, strict=False)
    return model


class HeldOut:
    """Noised samples and what the teacher predicts for them, to measure other models by.

    Args:
        teacher: the denoiser that others are held against.
        data: the first `count` samples are taken.
        task: how they are noised; the same times and noise for every model.
        count: samples, at most.
        batch_size: of them at once.
        seed: of times and noise.
    """

    @torch.no_grad()
    def __init__(
        self,
        teacher: nn.Module,
        data: Dataset,
        task: Denoising,
        count: int = 64,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        device = next(teacher.parameters()).device
        self.batches: list[tuple[Noised, dict[str, Tensor]]] = []
        for number, part in enumerate(torch.arange(min(count, len(data))).split(batch_size)):
            generator = generator_for(seed, number)
            batch = {k: v.to(device) for k, v in data.batch(part, generator).items()}
            self.batches.append((task.noised(batch, generator), condition_of(batch)))
        self.wanted = [_predicted(teacher, *batch) for batch in self.batches]

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """||model - teacher||^2 / ||teacher||^2 of the predictions."""
        got = [_predicted(model, *batch) for batch in self.batches]
        above = sum(float((g - w).square().sum()) for g, w in zip(got, self.wanted, strict=True))
        return above / sum(float(w.square().sum()) for w in self.wanted)


def _predicted(model: nn.Module, noised: Noised, condition: dict[str, Tensor]) -> Tensor:
    return anatomy.of(model).denoise(model, noised.latents, noised.timestep, condition).float()


def search(
    teacher: nn.Module,
    healed: nn.Module,
    method: Conversion,
    data: Dataset,
    task: Denoising,
    cost: Callable[[nn.Module], float] | None = None,
    count: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Curve:
    """Convert the layers that the prediction misses least first, and measure after each.

    The layers are ranked by the error that each causes alone; errors of several layers are
    measured, not added up.

    Args:
        teacher: the denoiser before conversion.
        healed: what `heal_layers` gave.
        method: the conversion, as it was healed.
        data: samples that did not train.
        task: how they are noised.
        cost: of a denoiser; by default the multiply-adds of one pass at the size that the model is
            made for. Give what you pay for: multiply-adds at your size, or measured seconds.
        count: samples that errors are measured on.
        progress: told (subsets done, subsets in all).
    """
    cost = cost or _multiply_adds
    held_out = HeldOut(teacher, data, task, count)
    family = anatomy.of(teacher)
    paths = {claim.site for claim in method.claims(family) if claim.how == "replaces"}
    blocks = sorted({site.block for site in family.sites() if site.path in paths})
    total, done = 2 * len(blocks) - 1, 0

    def measured(layers: Sequence[int]) -> float:
        nonlocal done
        error = held_out.error(assemble(teacher, healed, method, layers))
        done += 1
        if progress is not None:
            progress(done, total)
        return error

    alone = {block: measured([block]) for block in blocks}
    ranked = sorted(blocks, key=lambda block: alone[block])
    choices = [Choice((), 0.0, cost(teacher), "")]
    for number in range(1, len(ranked) + 1):
        layers = tuple(ranked[:number])
        error = alone[layers[0]] if number == 1 else measured(layers)
        model = assemble(teacher, healed, method, layers)
        spec = method.model_copy(update={"layers": tuple(sorted(layers))}).spec()
        choices.append(Choice(layers, error, cost(model), spec))
    return Curve(alone, tuple(choices))


def _multiply_adds(model: nn.Module) -> float:
    from pared.bench.bill import bill

    return bill(model).per_pass
