"""From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers.

arXiv 2503.06923, ICCV 2025.

What attentions and feed-forwards compute changes smoothly from step to step. At every N-th step
they are computed, and finite differences of their outputs are kept; at the steps between, a Taylor
series of these forecasts the outputs. Order 0 is plain reuse.

Implemented from the paper; no code taken. Forecast is what comes out of a branch before its gate,
so that the modulation of each step stays its own, as do embeddings and the last layer. Left open by
the paper and chosen here: the defaults W = 3, N = 4 and m = 1 for all models, since k^i / i! makes
noise larger with every order (the paper has m = 2 for FLUX and m = 4 for DiT); differences are
divided by the latest gap, as in the paper, also where gaps differ behind the warm-up, and
`predictor=newton` divides each by its own; they are taken in float32. `clock=time` puts timesteps
for numbers of steps, which the released code has in a comment; where one comes twice, the later
value counts. A site that missed a full step, since another method passed by its block, is computed
as soon as its last values are N steps old. `sites=block` forecasts what a block adds to each
stream, and `sites=output` what the last projection gives, by leaving out the model's whole forward.
A U-Net's convolutions are always computed, except there. Lumina-Next isn't served: its two
attentions hand on heads that are added up ahead of one projection, and a forecast of what comes out
of that would leave both running. Not verified: quality and speed at the paper's scale.

Departure: steps are rounds of the pipeline's loop, two for what a scheduler of second order (Heun)
calls a step, and its predictors and correctors share a series. With a series for each, and N in the
scheduler's own steps, gaps are twice as long in time: tried with Heun on house models, for no fewer
computed rounds, the distance to the full run was larger, except for a U-Net with N = 2.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import Field, model_validator
from torch import nn

from pared import anatomy
from pared.anatomy import Family, SiteKind
from pared.anatomy.base import Block, Branch
from pared.anatomy.sites import runs_twice
from pared.errors import InputError
from pared.info import Headline, Info
from pared.method import Claim, Handle, RuntimeMethod, denoiser
from pared.nn.forecast import Forecaster, History, Predictor, Stored, Streams, changed, changes
from pared.runtime import Around, Clock, detour

INFO = Info(
    slug="taylorseer",
    title="From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers",
    arxiv="2503.06923",
    venue="ICCV 2025",
    kind="runtime",
    families=("pixart", "dit", "sd3", "flux", "wan", "unet"),
    training=False,
    exact=False,
    maturity="faithful",
    summary="outputs of attentions and feed-forwards forecast at three of four steps",
    cls="TaylorSeer",
    headlines=(
        Headline(
            key="speedup-50",
            text="steps over full steps at 50 steps, W = 3 and N = 4 (paper: FLOPs of FLUX.1-dev)",
            paper=3.57,
            direction="higher",
            bound=3.57,
        ),
        Headline(
            key="distance-reuse-over-forecast",
            text="distance to the full model's pictures at 50 steps of DDIM, a guidance of 1.5 and "
            "N = 4, order 0 over order 1 (paper: DiT-XL/2 at a speed-up of 4.5, FID above 6 / "
            "2.65)",
            paper=2.26,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-fewer-steps-over-forecast",
            text="distance to the full model's pictures as above, 14 of 50 steps over N = 4 at the "
            "same cost (paper: no worse than 50 steps by ImageReward, 0.986 / 0.990)",
            paper=1.0,
            direction="higher",
            bound=1.0,
        ),
    ),
    grid=("interval=2", "interval=3", "", "interval=6", "sites=output,interval=2"),
)

# The site of the denoiser's output.
WHOLE = "denoiser"


class Known(NamedTuple):
    """What is known of a site.

    Attributes:
        step: that computed it last.
        history: of its values.
    """

    step: int
    history: History


class TaylorSeer(RuntimeMethod):
    """TaylorSeer, section 3 of the paper.

    The paper runs DiT-XL/2 for 50 steps with W = 2, N = 4 and m = 4, FLUX.1-dev for 50 steps with
    W = 3, N = 4 to 7 and m = 2. Memory: m + 1 tensors per site.
    """

    info = INFO

    interval: int = Field(default=4, ge=1, description="N, steps from one full step to the next")
    warmup: int = Field(default=3, ge=1, description="W, full steps at the start of a run")
    order: int = Field(
        default=1,
        ge=0,
        description="m, of the series; 0 is plain reuse, which bears guidance better",
    )
    sites: Literal["module", "block", "output"] = Field(
        default="module",
        description="what is forecast: outputs of attentions and feed-forwards, what whole blocks "
        "add, or the model's output alone",
    )
    predictor: Predictor = Field(
        default="taylor", description="series: the paper's, or newton, exact for polynomials"
    )
    clock: Literal["step", "time"] = Field(
        default="step", description="what series go by: number of the step, or its timestep"
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="indices of the blocks to work on, through the model; None: all"
    )
    kinds: tuple[SiteKind, ...] | None = Field(
        default=None,
        description="of modules, e.g. self_attention or feed_forward; FLUX's one-stream blocks "
        "count as joint_attention; None: all",
    )
    dtype: Stored | None = Field(
        default=None,
        description="to store factors in; None: that of the outputs, float32 for whole blocks",
    )

    @model_validator(mode="after")
    def _fitting(self) -> "TaylorSeer":
        if self.kinds is not None and self.sites != "module":
            raise ValueError(f"kinds choose modules, and sites={self.sites} forecasts none")
        if self.layers is not None and self.sites == "output":
            raise ValueError("layers choose blocks, and sites=output forecasts none")
        return self

    def full(self, step: int) -> bool:
        """Whether a step (from 0) is computed: T = 50 gives 0, 1, 2, 6, 10, ..."""
        return step < self.warmup or (step - self.warmup + 1) % self.interval == 0

    def claims(self, family: Family) -> list[Claim]:
        if self.sites == "output":
            paths = [WHOLE]
        elif self.sites == "block":
            paths = [block.path for block in self.blocks(family)]
        else:
            # What feeds a branch gives nothing back at forecast steps.
            paths = [path for b in self.branches(family) for path in (b.path, *b.feeds)]
        return [Claim(path, "reuses") for path in paths]

    def blocks(self, family: Family) -> list[Block]:
        """The chosen blocks.

        Raises:
            InputError: a chosen layer doesn't exist.
        """
        blocks = family.blocks
        if self.layers is None:
            return list(blocks)
        if missing := sorted(set(self.layers) - set(range(len(blocks)))):
            raise InputError(
                f"taylorseer: layers={missing} don't exist in {type(family.model).__name__}, which "
                f"has the blocks 0 to {len(blocks) - 1}."
            )
        return [block for block in blocks if block.index in self.layers]

    def branches(self, family: Family) -> list[Branch]:
        """The attentions and feed-forwards of the chosen blocks and kinds."""
        chosen = {block.index for block in self.blocks(family)}
        kinds = {site.path: site.kind for site in family.sites()}

        def wanted(branch: Branch) -> bool:
            own = [kinds[path] for path in (branch.path, *branch.feeds) if path in kinds]
            return branch.block in chosen and (self.kinds is None or own[0] in self.kinds)

        return [branch for branch in family.branches if wanted(branch)]

    def attach(self, pipeline: Any) -> Handle:
        family = anatomy.of(denoiser(pipeline))
        with ExitStack() as undo:
            seer = Seer(self, Clock(pipeline, undo))
            for module, around in self._detours(family, seer):
                detour(module, around, undo)
            return Handle(undo.pop_all(), (self,), seer.clock.stats)

    def _detours(self, family: Family, seer: "Seer") -> Iterator[tuple[nn.Module, Around]]:
        if self.sites == "output":
            yield family.model, ForecastModel(Site(seer, WHOLE))
        elif self.sites == "block":
            for block in self.blocks(family):
                yield block.module, ForecastBlock(Site(seer, block.path), block)
        else:
            for branch in self.branches(family):
                site = Site(seer, branch.path)
                yield branch.module, ForecastModule(site)
                for path in branch.feeds:
                    yield family.model.get_submodule(path), Feed(site)


# In the model -------------------------------------------------------------------------------------


class Seer:
    """Decides which sites are forecast at the running call.

    The clock keeps what is known of each site, under its path.
    """

    def __init__(self, settings: TaylorSeer, clock: Clock) -> None:
        self.settings, self.clock = settings, clock
        self.forecaster = Forecaster(settings.order, settings.predictor, settings.dtype)
        clock.on_call = self.decide

    @property
    def now(self) -> float:
        """Where the running step is in the series: its number, or its timestep, turned to rise."""
        return self.clock.step if self.settings.clock == "step" else -self.clock.reading.time

    def decide(self) -> frozenset[str]:
        """The paths of the sites to forecast."""
        step, kept = self.clock.step, self.clock.kept
        if self.settings.full(step):
            return frozenset()
        near = step - self.settings.interval
        return frozenset(p for p, at in kept.items() if isinstance(at, Known) and at.step > near)


class Site:
    """What is forecast as one: its values, one for each stream, and what they become."""

    def __init__(self, seer: Seer, path: str) -> None:
        self.seer, self.path = seer, path

    @torch.compiler.disable
    def due(self) -> bool:
        """Whether the running call forecasts it."""
        return self.path in cast(frozenset, self.seer.clock.plan)

    def keep(self, values: Streams) -> None:
        """Remember the values of a call that computed them."""
        clock, old = self.seer.clock, self.seer.clock.kept.get(self.path)
        if old is not None and old.step == clock.step:
            raise runs_twice("taylorseer", self.path)
        history = self.seer.forecaster.updated(old and old.history, self.seer.now, values)
        clock.kept[self.path] = Known(clock.step, history)
        clock.done[self.path] = "computed"

    def forecast(self) -> Streams:
        """The values of the running step."""
        clock = self.seer.clock
        clock.done[self.path] = "forecast"
        return self.seer.forecaster.forecast(clock.kept[self.path].history, self.seer.now)


class ForecastModule:
    """Goes around an attention or a feed-forward, which gives one tensor or a tuple of several.

    torch.compile takes the module's own forward and leaves what is around it to Python.
    """

    def __init__(self, site: Site) -> None:
        self.site = site

    @torch.compiler.disable(recursive=False)
    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.site.due():
            return self.forecast(args, kwargs)
        result = own(*args, **kwargs)
        self.keep(result, args, kwargs)
        return result

    @torch.compiler.disable
    def forecast(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of a call that isn't computed."""
        values = self.site.forecast()
        return values if len(values) > 1 else values[0]

    @torch.compiler.disable
    def keep(self, result: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Remember the result of a call."""
        self.site.keep(result if isinstance(result, tuple) else (result,))


class ForecastBlock(ForecastModule):
    """Goes around a block: what it adds to each stream is forecast."""

    def __init__(self, site: Site, block: Block) -> None:
        super().__init__(site)
        self.block = block

    @torch.compiler.disable
    def forecast(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        tokens = self.block.tokens(args, kwargs)
        return self.block.result(changed(tokens, self.site.forecast()))

    @torch.compiler.disable
    def keep(self, result: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = self.block.tokens(args, kwargs)
        self.site.keep(changes(tokens, self.block.outputs(result)))


class ForecastModel(ForecastModule):
    """Goes around the whole model, whose output is its last projection's, put in another order.

    Whoever called may write into what it gets, so what is kept isn't handed out.
    """

    @torch.compiler.disable
    def forecast(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        (sample,), kind = self.site.forecast(), self.site.seer.clock.kept["kind"]
        return kind((sample.clone(),)) if kind is tuple else kind(sample=sample.clone())

    @torch.compiler.disable
    def keep(self, result: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.site.keep((result[0],))
        self.site.seer.clock.kept["kind"] = type(result)


class Feed:
    """Goes around a module that works for a forecast branch alone, whose output nobody reads."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @torch.compiler.disable(recursive=False)
    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return (*args, *kwargs.values())[0] if self.site.due() else own(*args, **kwargs)
