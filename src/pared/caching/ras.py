"""Region-Adaptive Sampling for Diffusion Transformers.

arXiv 2502.10389, CVPR 2026.

A step refines some regions of the picture only, and these stay the same for a while. Each step
ranks patches by how much the last one varied over their channels; the chosen patches go through the
model and attend to the keys and values that every attention has kept of all patches, and the others
are given the prediction that they had last. At some dense steps everything is computed anew.

Implemented from the paper; no code taken. The released code ranks patches by m exp(k D), which
starves what was skipped; here the priority is exp(k D) / m, and k = 1 (`upstream_compat` has the
former; `high_ratio=0`, which skipped all there, means what it says). As there, D counts all skips
of a run, over dense steps too. Left open by the paper and chosen here: m is taken from what the
last step added to the latents. For an Euler step of a flow that is a multiple of the guided
prediction, so no weight of guidance is needed, and prompt and negative prompt, on a joint batch or
by calls in turn, choose the same patches, while each sample of a batch chooses for itself. A bare
denoiser's latents are compared from step to step likewise. A ramp has its mean over the steps that
aren't dense. Another cache beside it (of blocks, of branches, of cross-attentions' maps) shares the
resets: it works at dense steps alone, and those that fill the store of keys are full for it, too;
in between it computes what comes by and keeps nothing, since a part of the patches, each of another
age, is nothing to forecast from. So it gains where dense steps follow one another, before `start`
and from `end` on. FLUX, PixArt and DiT, which the paper doesn't run, work as SD3 and Lumina-Next
do. U-Nets aren't served, whose convolutions hear their neighbours; nor is Wan, which makes
positions for the whole grid of a video apart from its tokens. Steps are rounds of the pipeline's
loop. Not verified: quality and speed at the paper's scale; schedulers other than Euler's for flows,
which mix predictions of different age in every pixel.
"""

import warnings
from contextlib import ExitStack
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from pared import anatomy
from pared.anatomy import Family, Site
from pared.anatomy.sites import require_softmax
from pared.caching.regional import RegionalAttention, Regions
from pared.caching.regions import Metric
from pared.errors import InputError
from pared.info import Headline, Info
from pared.method import Claim, Handle, RuntimeMethod, denoiser
from pared.runtime import Clock, detour

INFO = Info(
    slug="ras",
    title="Region-Adaptive Sampling for Diffusion Transformers",
    arxiv="2502.10389",
    venue="CVPR 2026",
    kind="runtime",
    families=("sd3", "lumina", "flux", "pixart", "dit"),
    training=False,
    exact=False,
    maturity="faithful",
    summary="steps that refine half of the picture, which attends to kept keys of the rest",
    cls="RAS",
    grid=("ratio=0.75", "", "ratio=0.25"),
    headlines=(
        Headline(
            key="distance-without-kept-keys-over-ras",
            text="distance to the full model's pictures at half of the patches, attending to the "
            "active ones alone over attending to kept keys too (paper: FID 31.36 / 24.30)",
            paper=1.29,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-without-resets-over-ras",
            text="distance to the full model's pictures at half of the patches, without the dense "
            "steps in between over with them (paper: FID 46.10 / 35.81, an eighth of the patches)",
            paper=1.29,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-fewer-steps-over-ras",
            text="distance to the full model's pictures, fewer steps over RAS where both compute "
            "as many patches (paper: FID 39.70 / 31.99, 5 steps and 7)",
            paper=1.24,
            direction="higher",
            bound=1.0,
        ),
    ),
)

# By which a denoiser is given what a ControlNet adds: SD3's, FLUX's.
CONTROLS = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)


class RAS(RuntimeMethod):
    """Region-adaptive sampling, section 3 of the paper.

    The paper runs SD3 for 28 steps with resets (12, 20) and high_ratio 0.3, Lumina-Next for 30 with
    resets (12, 22) and, at 1024 pixels, a ramp of 256 patches.
    """

    info = INFO

    ratio: float = Field(default=0.5, gt=0, le=1, description="share of patches that are active")
    start: int = Field(default=4, ge=1, description="first step that isn't dense")
    end: int | None = Field(
        default=None, ge=1, description="step from which all are dense again; None: never"
    )
    resets: tuple[int, ...] = Field(default=(12, 22), description="dense steps in between")
    metric: Metric = Field(
        default="std", description="m: standard deviation over channels, or norm"
    )
    high_ratio: float = Field(
        default=1.0, ge=0, le=1, description="rho, share of the skipped that have the highest m"
    )
    k: float = Field(default=1.0, ge=0, description="weight of how often a patch was skipped")
    ramp: int = Field(
        default=0, description="patches that are skipped more after every `ramp_every` steps"
    )
    ramp_every: int = Field(default=4, ge=1, description="steps at the same number of patches")
    quantum: int = Field(
        default=1, ge=1, description="active patches are a multiple of it; 64 for compiled models"
    )
    upstream_compat: bool = Field(
        default=False, description="let what was skipped be skipped again, as the released code"
    )
    steps: int | None = Field(
        default=None, ge=1, description="of a run; None asks the pipeline, which knows its own"
    )

    @model_validator(mode="after")
    def _fitting(self) -> "RAS":
        if self.end is not None and self.end <= self.start:
            raise ValueError(
                f"end={self.end} leaves no step from start={self.start} on; give a later end"
            )
        return self

    def dense(self, step: int, steps: int | None = None) -> bool:
        """Whether a step computes all patches.

        Args:
            step: of a run, from 0.
            steps: of the run; None where nobody knows.
        """
        ends = [end for end in (self.end, steps) if end is not None]
        return (
            self.ratio == 1
            or step < self.start
            or step in self.resets
            or any(step >= end for end in ends)
        )

    def more(self, step: int, steps: int | None) -> int:
        """Patches that a ramp makes a step skip beyond the mean, over all that aren't dense.

        Args:
            step: that isn't dense.
            steps: of the run; None where nobody knows.

        Raises:
            InputError: nobody knows where the ramp ends.
        """
        if self.ramp == 0:
            return 0
        end = steps if self.end is None else self.end
        if end is None:
            raise InputError(
                f"ras: ramp={self.ramp} has its mean in the middle of the steps, and a denoiser "
                "alone doesn't say how many a run has; give steps or end, or apply the method to a "
                "pipeline."
            )
        level = {
            s: (s - self.start) // self.ramp_every
            for s in range(self.start, end)
            if not self.dense(s, steps)
        }
        return round(self.ramp * (level[step] - sum(level.values()) / len(level)))

    def claims(self, family: Family) -> list[Claim]:
        attentions = family.sites("self_attention", "joint_attention")
        # Keys and values of the others, and the prediction that they had.
        maps = [Claim(site.path, "reuses", "map") for site in attentions]
        return [*maps, Claim("denoiser", "reuses")]

    def attach(self, pipeline: Any) -> Handle:
        model = denoiser(pipeline)
        family = anatomy.of(model)
        sites = family.sites("self_attention", "joint_attention")
        self._require(family, sites, pipeline)
        with ExitStack() as undo:
            # Who shares the denoiser may have a ControlNet that this pipeline hasn't.
            asked = model.register_forward_pre_hook(_refuse_controlnet, with_kwargs=True)
            undo.callback(asked.remove)
            clock = Clock(pipeline, undo, self.steps, leads=True)
            regions = Regions(self, family, clock, len(sites))
            detour(family.model.get_submodule(family.embedder), regions.embed, undo)
            for site in sites:
                # Where another method leaves an attention out, this one isn't asked.
                detour(site.module, RegionalAttention(regions, site), undo, within=True)
            detour(family.model.get_submodule(family.output_layer), regions.finish, undo)
            return Handle(undo.pop_all(), (self,), regions.clock.stats)

    def _require(self, family: Family, sites: list[Site], pipeline: Any) -> None:
        """Refuse what can't work; warn of what nobody has tried."""
        for site in sites:
            require_softmax(site, self.info.slug)
        if self.metric == "std" and family.channels == 1:
            raise family.refuse("ras:metric=std", "its latents have one channel; use metric=norm.")
        if getattr(pipeline, "controlnet", None) is not None:
            raise InputError(
                f"ras can't be attached to a {type(pipeline).__name__}, whose ControlNet adds to "
                "all patches; use the pipeline without one."
            )
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not None and not _is_euler(scheduler):
            warnings.warn(
                f"ras is validated for Euler steps of flows; {type(scheduler).__name__} may mix "
                "predictions of different age in every pixel.",
                stacklevel=4,
            )


def _refuse_controlnet(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(kwargs.get(name) is not None for name in CONTROLS):
        raise InputError(
            f"ras can't be attached to a {type(model).__name__} that a ControlNet steers, which "
            "adds to all patches; take it off for such calls."
        )


def _is_euler(scheduler: Any) -> bool:
    from diffusers import FlowMatchEulerDiscreteScheduler

    plain = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    return plain and not scheduler.config.stochastic_sampling
