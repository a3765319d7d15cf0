"""DeepCache: Accelerating Diffusion Models for Free.

arXiv 2312.00858, CVPR 2024.

What the deep levels of a U-Net compute changes little from step to step. Every N-th step runs all
of it and keeps one tensor, the one that enters a shallow layer on the way up from below; the steps
between run only what lies above, on a fresh skip connection joined with the kept tensor.

Implemented from the paper; no code taken. Branch m runs m layers on the way down beside conv_in,
and m + 1 on the way up; that's the numbering of the released tool (the paper's own experiments call
its branch 1 layer 0 of block 0), and the defaults are those that it documents; on SD 1.5 the paper
has N = 5 at its branch 1. What lies below is left out, where the released tool calls every layer
and returns what it remembers, and what a ControlNet or a T2I-Adapter adds to layers that don't run
is left out with them. The quadratic schedule takes roots with their sign; the indices of the
released code, which drops the imaginary part of complex powers, are `released_steps`. Steps are
rounds of the pipeline's loop, two for what a scheduler of second order (Heun) calls a step. Chosen
here: a change of FreeU, of an adapter's scale or of other settings of a call makes a full step;
`warmup` and `final` add to the schedule. A ControlNet that falls silent between two full steps is
still in the kept tensor until the next. Steps of samplers that add fresh noise (ancestral, SDE)
differ more, so that one is warned of unless `warmup` is given; models distilled to a few steps have
little to leave out, so that runs of eight steps and fewer are full, with a warning, unless
`min_steps` says otherwise. Transformers have no such skip connections, and aren't served. Not
verified: quality at the paper's scale; the paper's U-Nets without text (DDPM, LDM) and for video.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family
from pared.anatomy.unet import Cut, Factors, Idle, UNet
from pared.caching.samplers import adds_noise
from pared.errors import InputError
from pared.info import Headline, Info
from pared.method import Claim, Handle, RuntimeMethod, denoiser
from pared.runtime import Clock, detour

INFO = Info(
    slug="deepcache",
    title="DeepCache: Accelerating Diffusion Models for Free",
    arxiv="2312.00858",
    venue="CVPR 2024",
    kind="runtime",
    families=("unet",),
    training=False,
    exact=False,
    maturity="faithful",
    summary="deep levels of a U-Net at every N-th step, the shallowest layers at all",
    cls="DeepCache",
    headlines=(
        Headline(
            key="speed-up-sd15",
            text="time of 50 steps of Stable Diffusion 1.5, plain over N = 5 at branch 1",
            paper=2.3,
            direction="higher",
            bound=2.0,
        ),
        Headline(
            key="distance-10-over-2",
            text="distance to the plain model's pictures, N = 10 over N = 2 (paper: LDM-4-G on "
            "ImageNet in 250 steps, FID 4.41 / 3.39)",
            paper=1.3,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-fewer-steps-over-deepcache",
            text="distance to the plain model's pictures in 50 steps, plain with fewer steps over "
            "N = 3 at the same cost (paper: comparable or slightly better at equal throughput)",
            paper=1.0,
            direction="higher",
            bound=1.0,
        ),
    ),
    grid=("interval=2", "", "interval=5", "interval=3,branch=1", "interval=5,branch=1"),
)

Mode = Literal["full", "retrieve"]


class DeepCache(RuntimeMethod):
    """One tensor of the last full step stands for all that lies below a skip connection."""

    info = INFO

    interval: int = Field(default=3, ge=1, description="N, steps from one full step to the next")
    branch: int = Field(
        default=0, ge=0, description="m, skip to cut below: layers on the way down that always run"
    )
    schedule: Literal["uniform", "quadratic"] | tuple[int, ...] = Field(
        default="uniform",
        description="full steps: every N-th; as many, dense around a center; or their numbers",
    )
    center: int = Field(default=15, ge=0, description="c, where the quadratic schedule is dense")
    power: float = Field(default=1.4, gt=1, description="p of the quadratic schedule")
    warmup: int = Field(default=0, ge=0, description="steps at the start of a run that are full")
    final: int = Field(default=0, ge=0, description="steps at the end of a run that are full")
    min_steps: int = Field(
        default=9, ge=1, description="shortest run in which anything is left out"
    )

    @field_validator("schedule", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        rising = isinstance(value, (tuple, list)) and all(type(s) is int and s >= 0 for s in value)
        if value in ("uniform", "quadratic") or (rising and [*value] == sorted({*value})):
            return value
        raise ValueError(
            "give uniform, quadratic, or the numbers of the full steps in rising order, from 0"
        )

    def full(self, step: int, steps: int | None) -> bool:
        """Whether a step runs the whole U-Net.

        Args:
            step: from 0.
            steps: of the run, or None where nobody knows.

        Raises:
            InputError: it depends on the number of steps, which nobody knows.
        """
        if steps is None and (self.schedule == "quadratic" or self.final):
            what = "the quadratic schedule" if self.schedule == "quadratic" else "final"
            raise InputError(
                f"deepcache: {what} needs the number of steps of a run, which a bare denoiser "
                "doesn't tell; apply the method to the pipeline."
            )
        if steps is not None and (steps < self.min_steps or step >= steps - self.final):
            return True
        if step < self.warmup:
            return True
        if self.schedule == "uniform":
            return step % self.interval == 0
        if self.schedule == "quadratic":
            return step in quadratic_steps(cast(int, steps), self.interval, self.center, self.power)
        return step in self.schedule

    def claims(self, family: Family) -> list[Claim]:
        idle = [part.path for part in self.cut(family).idle]
        sites = (s.path for s in family.sites() if any(s.path.startswith(f"{i}.") for i in idle))
        return [Claim(path, "reuses") for path in (*idle, *sites)]

    def cut(self, family: Family) -> Cut:
        """What is left of a U-Net at the steps between, and where the kept tensor enters.

        Raises:
            InputError: the model is no U-Net, or has no such branch.
        """
        if not isinstance(family, UNet):
            raise family.refuse(
                self.info.slug,
                "it cuts a U-Net below a skip connection, and this model has none; "
                f"it serves the families {', '.join(self.info.families)}.",
            )
        # Without a middle nothing is below the deepest.
        branches = len(family.skips) - (family.model.mid_block is None)
        if self.branch >= branches:
            raise family.refuse(
                self.info.slug,
                f"it has no branch {self.branch} with something below to leave out; the deepest is "
                f"{branches - 1}.",
            )
        return family.cut(self.branch)

    def attach(self, pipeline: Any) -> Handle:
        family = cast(UNet, anatomy.of(denoiser(pipeline)))
        cut = self.cut(family)
        self._warn_of_noise(pipeline)
        with ExitStack() as undo:
            plan = Plan(self, cut, family, Clock(pipeline, undo))
            hook = family.model.register_forward_pre_hook(plan.residuals, with_kwargs=True)
            undo.callback(hook.remove)
            for idle in cut.idle:
                detour(idle.module, Bypass(plan, idle), undo)
            detour(cut.entry, Entry(plan), undo)
            return Handle(undo.pop_all(), (self,), plan.clock.stats)

    def _warn_of_noise(self, pipeline: Any) -> None:
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not None and adds_noise(scheduler) and self.warmup == 0 < self.interval - 1:
            warnings.warn(
                f"deepcache expects steps that are like each other, and "
                f"{type(scheduler).__name__} adds fresh noise at each; give warmup, full steps at "
                "the start of a run, or take a sampler that adds none.",
                stacklevel=4,
            )


# The quadratic schedule ---------------------------------------------------------------------------

Power = Callable[[Any, float], Any]


def signed(x: float, exponent: float) -> float:
    """|x|^exponent with the sign of x."""
    return math.copysign(abs(x) ** exponent, x)


@cache
def quadratic_steps(steps: int, interval: int, center: int, power: float) -> tuple[int, ...]:
    """The full steps of a run, ceil(T / N) of them, dense around a center.

    Args:
        steps: T, of the run.
        interval: N.
        center: c.
        power: p; as much less as it takes for all to differ.

    Raises:
        InputError: no power above 1 makes them differ.
    """
    return _spread(steps, interval, center, power, signed)


def released_steps(
    steps: int, interval: int = 5, center: int = 15, power: float = 1.4
) -> tuple[int, ...]:
    """The same as the released code has them: powers are complex and lose their imaginary part.

    For `schedule`, where its pictures are to be made again.
    """
    return _spread(steps, interval, center, power, lambda x, exponent: complex(x) ** exponent)


def _spread(steps: int, interval: int, center: int, power: float, raised: Power) -> tuple[int, ...]:
    """0, and the inner ones of linspace((-c)^(1/p), (T - c)^(1/p), k + 1)^p + c."""
    count = math.ceil(steps / interval)
    if interval == 1:
        return tuple(range(steps))
    p = power
    while p > 1:
        low, high = raised(-center, 1 / p), raised(steps - center, 1 / p)
        points = (raised(low + (high - low) * i / count, p) for i in range(count + 1))
        found = sorted({int(point.real) for point in points})
        if len(found) == count + 1:
            return (0, *(center + i for i in found[1:-1]))
        p -= 0.02
    raise InputError(
        f"deepcache: {count} full steps in {steps} can't be spread around step {center} by a power "
        f"between 1 and {power}; use another center, a longer interval, or the uniform schedule."
    )


# In the model -------------------------------------------------------------------------------------


class Plan:
    """What happens at the running call."""

    def __init__(self, settings: DeepCache, cut: Cut, family: UNet, clock: Clock) -> None:
        self.settings, self.cut, self.family, self.clock = settings, cut, family, clock
        clock.on_call = self.decide

    @property
    def retrieves(self) -> bool:
        """Whether the running call leaves out what lies below."""
        return self.clock.plan == "retrieve"

    def decide(self) -> Mode:
        clock, kept = self.clock, self.clock.kept
        full = self.settings.full(clock.step, clock.steps)
        self._warn_of_few()
        factors = kept.get("factors") or Factors(self.family)
        now = factors.read()
        if full or "below" not in kept or kept["read"] != now:
            kept |= {"factors": factors, "read": now}
            return "full"
        return "retrieve"

    def _warn_of_few(self) -> None:
        least, steps = self.settings.min_steps, self.clock.steps
        if self.clock.step == self.clock.call == 0 and steps is not None and steps < least:
            warnings.warn(
                f"deepcache leaves nothing out of a run of {steps} steps, since so few have little "
                f"in common; with min_steps={steps} it does.",
                stacklevel=2,
            )

    def residuals(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The hook that takes back what a ControlNet or an adapter adds to idle layers."""
        return (args, self.cut.residuals(kwargs)) if self.retrieves else None


class Bypass:
    """Goes around what is idle at the steps between."""

    def __init__(self, plan: Plan, idle: Idle) -> None:
        self.plan, self.idle = plan, idle

    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        retrieves = self.plan.retrieves
        self.plan.clock.done[self.idle.path] = "reused" if retrieves else "computed"
        if not retrieves:
            return own(*args, **kwargs)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        # Blocks join and filter (FreeU) what they get, and no filter takes an empty tensor.
        return self.idle.result(hidden[:, :1])


class Entry:
    """Where what comes from below enters: the layer's input is that, then the skip's tensor."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(
        self, own: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        kept = self.plan.clock.kept
        if self.plan.retrieves:
            # Of the idle layers' stand-in there is one channel.
            hidden_states = torch.cat([kept["below"], hidden_states[:, 1:]], dim=1)
        else:
            # A copy, since a view would keep the whole input alive.
            kept["below"] = hidden_states[:, : self.plan.cut.channels].detach().clone()
        return own(hidden_states, *args, **kwargs)
