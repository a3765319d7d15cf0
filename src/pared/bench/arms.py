"""The arms of a bench: what each one runs, and with which methods."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from pared import anatomy, method
from pared.bench.subjects import PipelineSubject, Subject, device_of
from pared.errors import InputError
from pared.method import Conversion, Method, RuntimeMethod

Kind = Literal["base", "runtime", "converted", "model", "fewer steps"]


@dataclass(frozen=True)
class Arm:
    """One row of a report.

    Attributes:
        name: as the user calls it.
        kind: what it is: the base, run-time methods on it, a copy of it that was converted here, a
            model that the user brought, or the base with fewer steps.
        subject: what runs; has its own denoiser where that differs from the base's.
        methods: run-time methods, attached around each of its runs.
        steps: of a run, where it differs from the subject's own.
        converted: what its denoiser, a copy, was converted with here.
    """

    name: str
    kind: Kind
    subject: Subject
    methods: tuple[RuntimeMethod, ...] = ()
    steps: int | None = None
    converted: tuple[Conversion, ...] = ()

    @property
    def stack(self) -> tuple[Method, ...]:
        """All methods: those the denoiser was converted with, then those attached."""
        return (*method.stack_of(self.subject.model), *self.methods)

    def attached(self) -> AbstractContextManager[Any]:
        """The context that the arm's runs need."""
        return method.apply(self.subject.target, *self.methods) if self.methods else nullcontext()

    def run(self) -> Any:
        """One whole call; must be inside `attached`."""
        return self.subject.run(self.steps)

    def fewer(self, steps: int) -> Arm:
        """The same with fewer steps, as a rival for methods that save steps' worth of work."""
        name = f"{self.name}, {steps} step{'s' if steps > 1 else ''}"
        return replace(self, name=name, kind="fewer steps", steps=steps)


def arms_of(subject: Subject, given: Mapping[str, Any], base: str) -> dict[str, Arm]:
    """The arms by name, the base first.

    Args:
        subject: the pipeline or model that was given to the bench.
        given: by name a list of methods (or their specs), a model, or a pipeline.
        base: name of the base; without methods where it isn't among those given.

    Raises:
        InputError: an arm is none of these, doesn't fit the base, or there is none but the base.
    """
    given = {base: given.get(base, [])} | {k: v for k, v in given.items() if k != base}
    if len(given) < 2:
        raise InputError(
            f'the bench has no arm beside "{base}"; give one, e.g. {{"{base}": [], "taylorseer": '
            "[pared.TaylorSeer()]}."
        )
    arms = {name: _arm(subject, name, value) for name, value in given.items()}
    arms[base] = replace(arms[base], kind="base")
    _check_devices(arms)
    return arms


def _arm(subject: Subject, name: str, given: Any) -> Arm:
    if isinstance(given, (Method, str)):
        given = [given]
    if isinstance(given, (list, tuple)):
        return _with_methods(subject, name, [_method(name, each) for each in given])
    if hasattr(given, "components"):
        if not isinstance(subject, PipelineSubject):
            raise InputError(
                f'the arm "{name}" is a pipeline and the base a bare denoiser; give both as the '
                "same kind of thing."
            )
        return Arm(name, "model", subject.with_pipeline(given))
    if isinstance(given, nn.Module):
        return Arm(name, "model", subject.with_model(given))
    raise InputError(
        f'the arm "{name}" is a {type(given).__name__}; give a list of methods, a model or a '
        "pipeline."
    )


def _method(arm: str, given: Any) -> Method:
    found = method.parse(given) if isinstance(given, str) else given
    if isinstance(found, (Conversion, RuntimeMethod)):
        return found
    raise InputError(
        f'the arm "{arm}" lists {found!r}, which is no method that changes a model or how it runs; '
        "list methods such as pared.EDiT()."
    )


def _with_methods(subject: Subject, name: str, methods: list[Method]) -> Arm:
    conversions = tuple(m for m in methods if isinstance(m, Conversion))
    attached = tuple(m for m in methods if isinstance(m, RuntimeMethod))
    if conversions:
        # Converted on a copy: the user's model stays as it is.
        model = copy.deepcopy(anatomy.unwrap(subject.model))
        subject = subject.with_model(method.convert(model, *conversions).eval())
    kind: Kind = "converted" if conversions else "runtime"
    arm = Arm(name, kind, subject, attached, converted=conversions)
    with arm.attached():  # refuses what doesn't fit, before anything is measured
        return arm


def _check_devices(arms: dict[str, Arm]) -> None:
    places = {name: device_of(arm.subject.model) for name, arm in arms.items()}
    first, *others = places
    for name in others:
        if places[name] != places[first]:
            raise InputError(
                f'the arm "{name}" lies on {places[name]} and "{first}" on {places[first]}; put '
                "them on one device."
            )


def rival_steps(steps: int, full: float, half: float, wanted: float) -> int:
    """The number of steps with which the base takes about as long as an arm does.

    A run takes a + b x steps: the encoders and the decoder run once, whatever the steps.

    Args:
        steps: of the base's run, at least 2.
        full: seconds of the base's run.
        half: seconds of the base's run with steps // 2 steps.
        wanted: seconds of the arm's run.

    Returns:
        Steps whose time is nearest, from 1 to `steps`.
    """
    each = (full - half) / (steps - steps // 2)
    if each <= 0:
        return steps
    nearest = steps - (full - wanted) / each
    return min(steps, max(1, round(nearest)))


@contextmanager
def evaluating(arms: Mapping[str, Arm]) -> Iterator[None]:
    """Every denoiser in evaluation mode (dropout would be timed), and afterwards as it was."""
    models = {id(arm.subject.model): arm.subject.model for arm in arms.values()}
    training = [model for model in models.values() if model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()
