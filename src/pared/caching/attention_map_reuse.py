"""Fast Sampling Through The Reuse Of Attention Maps In Diffusion Models: HURRY and PHAST.

arXiv 2401.01008.

The softmax maps of a model's attentions change little from step to step. At the steps that a fixed
schedule names, queries, keys and softmax are skipped and the last computed map is applied to fresh
values. HURRY reuses in the last steps of a run, PHAST where a search found that it harms least.

Implemented from the paper; no code taken, none is released. The formulas of the schedules, the
search's rule and the tables couldn't be reached: `pared.caching.schedules` says what was chosen.
Chosen here: self- and cross-attention both reuse (`sites`), and joint attention counts as self-;
one bit for each call of the denoiser, the same for all layers, with layers to leave out (`layers`);
where a cross-attention reads a prompt, its map's product with the values can't change, and is kept
in the place of the map (`keep_output`). A step whose map nobody will use runs the model's own
processor, so that no reuse at all is the model itself bit for bit; only the step ahead of a reuse
computes its softmax in the open, by the attention's own options for precision, and maps are dropped
behind their last use. A map belongs to one run, one call of a step, one set of shapes and one
prompt: anything else computes anew. By default every second step reuses, which on small models is
far closer to the full run than HURRY and needs no search. On videos of Wan at full size self-
attention's maps fit nowhere (26 GB a layer for 5 s of 480 lines), and `sites=cross` is what makes
sense. Lumina-Next isn't served: its attentions hand on heads of their own layout, queries sharing
keys. A fused kernel never forms the map, and forming it can cost more than reuse saves: at full
size on a CPU reuse pays on PixArt-Sigma, and on Stable Diffusion 1.5 and 3.5 it doesn't (*Reuse at
full size* has the times). Not verified: quality and time at the paper's scale.
"""

from contextlib import ExitStack
from typing import Any, ClassVar, Literal, cast

from pydantic import Field, field_validator, model_validator

from pared import anatomy
from pared.anatomy import Family, Site, SiteKind
from pared.anatomy.sites import chosen, require_softmax
from pared.caching.kept_maps import (
    JointMapReuse,
    MapReuse,
    Memory,
    Mode,
    Processor,
    VideoMapReuse,
)
from pared.caching.schedules import Bits, ReuseSchedule, alternate, hurry, with_reuse
from pared.errors import InputError
from pared.info import Headline, Info
from pared.method import Claim, Handle, RuntimeMethod, denoiser
from pared.runtime import Clock

INFO = Info(
    slug="attention-map-reuse",
    title="Fast Sampling Through The Reuse Of Attention Maps In Diffusion Models",
    arxiv="2401.01008",
    venue="arXiv 2023; a journal version followed",
    kind="runtime",
    families=("unet", "pixart", "dit", "sd3", "flux", "wan"),
    training=False,
    exact=False,
    maturity="partial",
    summary="softmax maps of an earlier step applied to fresh values",
    cls="AttentionMapReuse",
    grid=("", "sites=self", "sites=cross", "reuse=hurry"),
    headlines=(
        Headline(
            key="decibels-over-fewer-steps",
            text="PSNR to the pictures of 20 steps: 10 of them reusing by PHAST, less 13 steps "
            "(paper: visibly closer, no number)",
            paper=0.0,
            direction="higher",
            bound=0.0,
        ),
        Headline(
            key="decibels-phast-over-hurry",
            text="PSNR to the pictures of 20 steps with 10 reusing, PHAST less HURRY "
            "(paper: PHAST improves on HURRY, no number)",
            paper=0.0,
            direction="higher",
            bound=0.0,
        ),
        Headline(
            key="time-over-13-steps",
            text="time of 20 steps with 10 reusing over that of 13 steps "
            "(paper: the two that its first figure pairs)",
            paper=1.0,
            direction="lower",
            bound=1.1,
        ),
    ),
)

KINDS: dict[str, tuple[SiteKind, ...]] = {
    "self": ("self_attention", "joint_attention"),
    "cross": ("cross_attention",),
    "both": ("self_attention", "joint_attention", "cross_attention"),
}


class AttentionMapReuse(RuntimeMethod):
    """Reuse of softmax maps under a binary schedule gamma."""

    info = INFO
    policies: ClassVar[tuple[str, ...]] = ("alternate", "hurry")

    reuse: tuple[int, ...] | str = Field(
        default="alternate",
        description="alternate; hurry: the last ones; the steps that reuse, counted from 0; or a "
        "file that `pared search` wrote",
    )
    count: int | None = Field(
        default=None,
        ge=0,
        description="k, steps that reuse, the last 2k of them in turn under alternate; None: half",
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        description="N, calls of the denoiser in a run; None: as the pipeline says",
    )
    sites: Literal["self", "cross", "both"] = Field(
        default="both", description="attentions that reuse"
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="indices of the blocks to work on, through the model; None: all"
    )
    keep_output: bool = Field(
        default=True,
        description="of a cross-attention to a prompt, keep the output and not the map",
    )

    @field_validator("reuse")
    @classmethod
    def _known(cls, reuse: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if isinstance(reuse, tuple):
            if reuse and min(reuse) < 1:
                raise ValueError("step 0 has nothing to reuse; name steps from 1 on")
            return tuple(sorted(set(reuse)))
        if reuse not in cls.policies:
            ReuseSchedule.load(reuse)
        return reuse

    @model_validator(mode="after")
    def _agree(self) -> "AttentionMapReuse":
        if self.count is not None and self.reuse not in self.policies:
            raise ValueError(
                f"count={self.count} goes with hurry and alternate, which place the steps; leave "
                "it out"
            )
        if self.steps is not None:
            self.resolved().bits(self.steps)
        return self

    # The schedule ---------------------------------------------------------------------------------

    def under(self, bits: Bits) -> "AttentionMapReuse":
        """The same under another schedule."""
        schedule = ReuseSchedule(tuple(bits))
        reuse = tuple(step for step, bit in enumerate(schedule.bits) if bit)
        return self.model_copy(update={"reuse": reuse, "steps": schedule.steps, "count": None})

    def resolved(self) -> "AttentionMapReuse":
        """The same with a schedule from a file read in.

        Raises:
            InputError: the file is gone, or for another number of steps.
        """
        if isinstance(self.reuse, tuple) or self.reuse in self.policies:
            return self
        found = self.under(ReuseSchedule.load(self.reuse).bits)
        found._require_steps(self.steps)
        return found

    def bits(self, steps: int) -> Bits:
        """gamma of a run of so many steps.

        Raises:
            InputError: the schedule doesn't fit them.
        """
        self._require_steps(steps)
        if isinstance(self.reuse, tuple):
            if self.reuse and self.reuse[-1] >= steps:
                raise InputError(
                    f"reuse={list(self.reuse)} doesn't fit a run of {steps} steps; name steps up "
                    f"to {steps - 1}."
                )
            return with_reuse(steps, self.reuse)
        if self.reuse == "hurry":
            return hurry(steps, steps // 2 if self.count is None else self.count)
        if self.count is None:
            return tuple(step % 2 for step in range(steps))
        return alternate(steps, self.count)

    def reuses(self, step: int, steps: int | None) -> bool:
        """gamma of one step, from 0, of a run of so many; None: nobody knows.

        Raises:
            InputError: the schedule doesn't fit, or counts from the end of a run that isn't known.
        """
        if steps is not None:
            return step < steps and bool(self.bits(steps)[step])
        if isinstance(self.reuse, tuple):
            return step in self.reuse
        if self.reuse == "alternate" and self.count is None:
            return step % 2 == 1
        raise InputError(
            f"{self.info.slug}: {self.spec().partition(':')[2]} counts steps from the end, and a "
            "bare denoiser doesn't say how many a run has; give steps=N or attach to the pipeline."
        )

    def _require_steps(self, steps: int | None) -> None:
        if None not in (steps, self.steps) and steps != self.steps:
            raise InputError(
                f"the reuse schedule is for {self.steps} steps and the run has {steps}; run "
                f"{self.steps}, or take a schedule for {steps}."
            )

    # Attaching ------------------------------------------------------------------------------------

    def claims(self, family: Family) -> list[Claim]:
        return [Claim(site.path, "reuses", "map") for site in self.attentions(family)]

    def attentions(self, family: Family) -> list[Site]:
        """The attentions that reuse."""
        found = chosen(family, self.info.slug, KINDS[self.sites], self.layers)
        if not found and family.sites(*KINDS["both"]):
            raise family.refuse(
                f"{self.info.slug}:sites={self.sites}",
                f"it has no {self.sites}-attention; take sites=both.",
            )
        return found

    def attach(self, pipeline: Any) -> Handle:
        model = denoiser(pipeline)
        family, settings = anatomy.of(model), self.resolved()
        sites = self.attentions(family)
        for site in sites:
            self._require(site)
        steps = settings.steps if pipeline is model else None
        if pipeline is model:
            settings.reuses(0, steps)
        with ExitStack() as undo:
            plan = Plan(settings, Clock(pipeline, undo, steps), len(sites))
            for site in sites:
                memory, video = Memory(plan.clock, site.path), family.name == "wan"
                ours = _processor(site, memory, self.keep_output, video)
                plan.clock.put(site, ours, undo)
            return Handle(undo.pop_all(), (self,), plan.clock.stats)

    def _require(self, site: Site) -> None:
        require_softmax(site, self.info.slug)
        pictured = getattr(site.module, "add_k_proj", None) is not None
        if pictured and site.kind == "cross_attention" and not self.keep_output:
            raise InputError(
                f"attention-map-reuse:keep_output=false can't be attached to {site.path}, which "
                "has two maps, one of the prompt and one of a picture; keep the output."
            )


# In the model -------------------------------------------------------------------------------------


class Plan:
    """What all attentions do at the running call."""

    def __init__(self, settings: AttentionMapReuse, clock: Clock, sites: int) -> None:
        self.settings, self.clock = settings, clock
        clock.stats["sites"] = sites
        clock.on_call = self.decide

    def decide(self) -> Mode:
        clock = self.clock
        now, coming = (
            self.settings.reuses(step, clock.steps) for step in (clock.step, clock.step + 1)
        )
        if now:
            return "reuse" if coming else "last"
        clock.kept.clear()
        return "keep" if coming else "own"


def _processor(site: Site, memory: Memory, keep_output: bool, video: bool) -> Processor:
    single = VideoMapReuse if video else MapReuse
    made: type[Processor] = JointMapReuse if site.kind == "joint_attention" else single
    constant = keep_output and site.kind == "cross_attention"
    return made(memory, cast(Any, site.module).processor, constant)
