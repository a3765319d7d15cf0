"""Progressive distillation of a guided student: half the steps, again and again.

Stage two of On Distillation of Guided Diffusion Models (arXiv 2210.03142, CVPR 2023), after
Progressive Distillation (arXiv 2202.00512, ICLR 2022). A student of N steps learns to go in one
step where its teacher, the student before, goes in two; then it is the teacher of the next one, of
N / 2 steps. The guidance weight stays an input all the way. A model that has no input for it is
distilled as it is, with w_max = 0: that is plain progressive distillation.

In a recipe the rounds are a stage, see `pared.few_step.rounds`.

Three kinds of student (`Stepper`): one for the deterministic sampler, one for the stochastic
sampler, and an encoder, which goes from pictures to noise.

Implemented from the papers; no code taken. Left open, or not confirmed, and chosen here: the
encoder is distilled without guidance (w = 0), and begins at t = 0.001, since no step can leave from
no noise at all; the last two rounds are longer. A model that predicts noise is a poor student of
one or two steps, where its estimate of the picture at t = 1 is noise over a small number; take one
that predicts v or a flow. Not verified: quality at the paper's scale.
"""

import copy
from collections.abc import Callable
from pathlib import Path as Folder
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.nn.diffusion import ddim_step, noised, one_of_two, renoised, scaled
from pared.objectives.denoising import Denoising, clean_latents, condition_of
from pared.objectives.distillation import Distillation
from pared.objectives.guided import WEIGHT, drawn_weights
from pared.objectives.noise import randn_like
from pared.objectives.paths import Estimate, Path, Weighting
from pared.training import Dataset, Run, TrainingSettings, train

# What the student is for: which sampler, or encoding.
Stepper = Literal["deterministic", "stochastic", "encoder"]

# Where the encoder begins.
T_0 = 1e-3

# How many of the last rounds are longer than the others.
LONG_ROUNDS = 2


# Learning -----------------------------------------------------------------------------------------


class Times(NamedTuple):
    """t, t' and t'' of the teacher's two steps, float64 (batch,) each."""

    start: Tensor
    middle: Tensor
    end: Tensor


def times(i: Tensor, steps: int, stepper: Stepper) -> Times:
    """The teacher's two steps that the student learns to make in one.

    Args:
        i: which of the student's times, (batch,), from 1 to `steps`.
        steps: N of the student.
        stepper: for the stochastic sampler the student steps over 2 / N, except from 1 / N, where
            one teacher's step is left to learn: there the first of the two goes nowhere.
    """
    i = i.double()
    t, before = i / steps, (i - 1) / steps  # exactly 0 before 1 / N
    half = (2 * i - 1) / (2 * steps)
    if stepper == "deterministic":
        return Times(t, half, before)
    if stepper == "encoder":
        return Times(before.clamp(min=T_0), half, t)
    return Times(t, torch.where(i > 1, before, t), (i - 2).clamp(min=0) / steps)


def target(teacher: Estimate, z: Tensor, times: Times, path: Path) -> Tensor:
    """The clean estimate that takes the student in one step where the teacher goes in two.

    Args:
        teacher: its clean estimate.
        z: points of the path at `times.start`, (batch, ...).
        times: where the teacher steps.
        path: from data to noise.

    Returns:
        x~, shaped like `z`.
    """
    t, middle, end = (path.level(time) for time in times)
    first = teacher(z, times.start)
    second = teacher(ddim_step(z, first, t, middle), times.middle)
    return one_of_two(first, second, t, middle, end)


class Progressive(Distillation):
    """The error against two steps of the teacher in one.

    Batch: as for `Denoising`.

    Args:
        steps: N of the student.
        w_min: smallest guidance weight; each sample has its own.
        w_max: largest one.
        stepper: what the student is for; an encoder has w = 0.
        weighting: see `pared.objectives.paths.Weighting`.
        task: what the denoiser predicts.

    Raises:
        InputError: w_min and w_max are no range, there is no such stepper or weighting, or there
            are more steps than times that the denoiser was trained on.
    """

    def __init__(
        self,
        steps: int,
        w_min: float = 0.0,
        w_max: float = 14.0,
        stepper: Stepper = "deterministic",
        weighting: Weighting = "velocity",
        task: Denoising | None = None,
    ) -> None:
        super().__init__(task, output=1.0, feature=0.0, truth=0.0)
        _check_choice("stepper", stepper, Stepper)
        _check_choice("weighting", weighting, Weighting)
        if not 0 <= w_min <= w_max:
            raise InputError(
                f"guidance weights from {w_min:g} to {w_max:g} can't be drawn; give w_min from 0 "
                "up to w_max."
            )
        self.steps, self.stepper, self.weighting = steps, stepper, weighting
        self.w_min, self.w_max = (0.0, 0.0) if stepper == "encoder" else (w_min, w_max)
        self.path = Path.of(self.task)
        self.path.require(steps if stepper == "stochastic" else 2 * steps)
        self.label = f"N = {steps}"

    def bind(self, student: nn.Module, teacher: nn.Module, data: Any = None) -> "Progressive":
        """Set the teacher (never trained).

        Raises:
            InputError: weights of guidance would be drawn that the student doesn't read, or teacher
                and student aren't of one architecture.
        """
        if self.w_max > 0 and WEIGHT not in anatomy.of(student).inputs:
            raise InputError(
                "the model to distil reads no guidance weight; convert and train it with "
                "guidance-distillation first, or set w_max to 0."
            )
        super().bind(student, teacher)
        return self

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        x = clean_latents(batch, generator)
        w = drawn_weights(len(x), self.w_min, self.w_max, generator).to(x.device)
        condition = condition_of(batch) | {WEIGHT: w}
        i = torch.randint(1, self.steps + 1, (len(x),), generator=generator)
        steps = times(i, self.steps, self.stepper)
        level, path = self.path.level(steps.start), self.path
        z = noised(x, randn_like(x, generator), level)
        with torch.no_grad():
            wanted = target(path.estimate(self.teacher, condition), z, steps, path)
        timestep = path.timestep(steps.start).to(z.device)
        prediction = anatomy.of(model).denoise(model, z, timestep, condition).float()
        error = path.error(prediction, path.predicted(wanted, z, level), level, self.weighting)
        return {"progressive": error}


def halve(
    student: nn.Module,
    objective: Progressive,
    data: Dataset,
    settings: TrainingSettings,
    folder: str | Folder,
    last: int = 1,
    final_round_multiplier: int = 2,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Run:
    """Train `student` in place through rounds of ever fewer steps; each one's teacher is the last.

    Every round is a run of its own, with the learning rate's schedule from its beginning, in a
    folder `round-1-steps-16` of its own. Called again after a stop, it goes over finished rounds
    and on from where it was.

    Args:
        student: at first the teacher of the first round, e.g. healed by `Guided`.
        objective: with the N of the first round, which is left with that of the last one.
        data: latents with conditions, see `pared.worlds.datasets.LatentData`.
        settings: of a round; its `steps` are the updates per round.
        folder: takes the rounds' folders.
        last: N of the last round.
        final_round_multiplier: how many times longer the last two rounds are.
        on_step: called after each update with its number in the round and its mean loss terms.

    Returns:
        The last round that was run; not `finished` where it was interrupted.

    Raises:
        InputError: halving doesn't lead from the first N to the last, or as for `Progressive.bind`.
    """
    rounds = halvings(objective.steps, last)
    updates = updates_of(len(rounds), settings.steps, final_round_multiplier)
    for number, (steps, count) in enumerate(zip(rounds, updates, strict=True), start=1):
        teacher = copy.deepcopy(anatomy.unwrap(student)).requires_grad_(False)
        objective.steps = steps
        objective.label = f"round {number} of {len(rounds)}, N = {steps}"
        objective.bind(student, teacher)
        of_round = settings.model_copy(update={"steps": count})
        place = Folder(folder) / f"round-{number}-steps-{steps}"
        run = train(student, objective, data, of_round, place, on_step)
        if not run.finished:
            break
    return run


def updates_of(rounds: int, updates: int, final_round_multiplier: int) -> list[int]:
    """How many updates each of so many rounds has; the last two are longer."""
    long = min(rounds, LONG_ROUNDS)
    return [updates] * (rounds - long) + [updates * final_round_multiplier] * long


def halvings(first: int, last: int) -> list[int]:
    """Numbers of steps from `first` down to `last`, each half of the one before.

    Raises:
        InputError: they don't lead there.
    """
    found = [first]
    while found[-1] > last and found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    if found[-1] != last or last < 1:
        raise InputError(
            f"halving {first} steps doesn't lead to {last}; begin with {last} times a power of two."
        )
    return found


def _check_choice(name: str, value: Any, kind: Any) -> None:
    """Refuse what isn't among the values of a Literal."""
    if value not in (known := get_args(kind)):
        raise InputError(f"{name} {value!r} doesn't exist; give {' or '.join(known)}.")


# Sampling -----------------------------------------------------------------------------------------


def sample(estimate: Estimate, z: Tensor, path: Path, steps: int) -> Tensor:
    """The deterministic sampler: from t = 1 to 0 in `steps` equal steps, one call each.

    Args:
        estimate: clean estimate, see `Path.estimate`.
        z: noise, (batch, ...).
        path: from data to noise.
        steps: N.

    Returns:
        Samples of the data, shaped like `z`.
    """
    for i in range(steps, 0, -1):
        t, s = _time(i / steps, z), _time((i - 1) / steps, z)
        z = ddim_step(z, estimate(z, t), path.level(t), path.level(s))
    return z


def sample_stochastically(
    estimate: Estimate, z: Tensor, path: Path, steps: int, generator: torch.Generator
) -> Tensor:
    """The stochastic sampler: two steps' length ahead, one back with fresh noise; N calls.

    Args:
        estimate: clean estimate of a student for this sampler.
        z: noise, (batch, ...).
        path: from data to noise.
        steps: N.
        generator: source of the fresh noise (CPU).

    Returns:
        Samples of the data, shaped like `z`.
    """
    for i in range(steps, 1, -1):
        t, s, k = (_time((i - back) / steps, z) for back in (0, 1, 2))
        z = ddim_step(z, estimate(z, t), path.level(t), path.level(k))
        z = renoised(z, randn_like(z, generator), path.level(k), path.level(s))
    t, end = _time(1 / steps, z), _time(0, z)
    return ddim_step(z, estimate(z, t), path.level(t), path.level(end))


def encode(estimate: Estimate, x: Tensor, path: Path, steps: int) -> Tensor:
    """The deterministic sampler run backwards, from data to the noise that it makes them of.

    Decoded under another condition, the noise keeps the picture's layout.

    Args:
        estimate: clean estimate, under the condition of `x`.
        x: data, (batch, ...).
        path: from data to noise.
        steps: N.

    Returns:
        Noise, shaped like `x`.
    """
    # At T_0 there is next to no noise: the mean stands for it.
    z = scaled(path.level(_time(T_0, x)).alpha, x)
    for i in range(steps):
        t, s = _time(max(i / steps, T_0), x), _time((i + 1) / steps, x)
        z = ddim_step(z, estimate(z, t), path.level(t), path.level(s))
    return z


def _time(t: float, z: Tensor) -> Tensor:
    """One time for all samples, (batch,)."""
    return torch.full((len(z),), t, dtype=torch.float64)
