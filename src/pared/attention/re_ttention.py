"""Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape.

arXiv 2505.22918, NeurIPS 2025.

Image tokens attend to a few percent of the keys, a band of the token order, without training. Now
and then a full step remembers two things that hardly change from step to step: which share of the
softmax denominator the band holds, and what the keys outside of it add. At the sparse steps the
share scales the band's softmax down to what it is in the full one, and the rest is added.

Implemented from the paper; no code taken. Where the released code emulates sparsity by a dense
mask, the sparse steps here compute the band alone, and the ratio rho comes from two log-sum-exps.
Left open by the paper and chosen here: rho is clamped to 1 (`clamp`); the residual R is kept ahead
of the output projection, which is linear, so that bias and rescaling are applied once, to the sum
of both parts; the first step behind the warm-up is a cache step whatever `interval` (the paper's
warm-ups are multiples of it); a band has at least one neighbour on either side, and `keep=1` keeps
all keys, which a band as wide as the image wouldn't; in joint attention all queries keep the
prompt's keys and the prompt's queries keep all keys, so that their rho is 1, their R is zero, and
neither moves; where guidance calls for prompt and negative prompt in turn, each has its own memory.
A band of the token order is one of a picture's rows: Wan isn't served, whose videos would need one
in every frame, nor Lumina-Next, whose queries share keys and whose attentions hand on heads.
Not verified: quality and speed at the paper's scale; on GPUs the band is gathered by plain PyTorch,
not by a fused kernel. On the small trained model that comes with pared R alone does as well as
both.
"""

from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, cast

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family, Grid, Site
from pared.attention.joint import Heads, JointProcessor, all_keys
from pared.attention.mixing import Processor, chosen, projected
from pared.errors import InputError
from pared.info import Headline, Info
from pared.method import Claim, Handle, RuntimeMethod, denoiser
from pared.nn.banded_attention import Attended, banded_attention, dense_attention, merged
from pared.nn.layout import merge_heads
from pared.runtime import Clock

INFO = Info(
    slug="re-ttention",
    title="Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape",
    arxiv="2505.22918",
    venue="NeurIPS 2025",
    kind="runtime",
    families=("pixart", "dit", "sd3", "flux", "unet"),
    training=False,
    exact=False,
    maturity="faithful",
    summary="a band of 3% of the keys, scaled and completed by what a full step remembered",
    cls="Rettention",
    grid=("keep=0.125", "keep=0.25"),
    headlines=(
        Headline(
            key="sparsity-1024",
            text="share of the attention map of PixArt at 1024x1024 that isn't computed",
            paper=0.969,
            direction="higher",
            bound=0.968,
        ),
        Headline(
            key="distance-window-over-rettention",
            text="distance to the full model's pictures at 3.1% of the keys, window and residual "
            "with rho = 1 over Re-ttention (paper: DiTFastAttn, LPIPS 0.590 / 0.372)",
            paper=1.59,
            direction="higher",
            bound=1.0,
        ),
    ),
)

Mode = Literal["plain", "cache", "sparse"]


class Rettention(RuntimeMethod):
    """Attention statistical reshape, section 4 of the paper.

    PixArt runs 20 steps with the defaults; the paper's warm-up for HunyuanDiT (50 steps) is 10, for
    CogVideoX (50 steps) 15.
    """

    info = INFO

    keep: float = Field(
        default=0.03125, gt=0, le=1, description="s, width of the band over image tokens"
    )
    warmup: int = Field(default=5, ge=1, description="W, full steps at the start of a run")
    interval: int = Field(default=5, ge=1, description="P, steps from one cache step to the next")
    ramp: float = Field(default=0.04, ge=0, description="lambda, growth of rho per sparse step")
    clamp: bool = Field(default=True, description="keep rho from growing beyond 1")
    layers: tuple[int, ...] | None = Field(
        default=None, description="indices of the blocks to work on, through the model; None: all"
    )

    def mode(self, step: int) -> Mode:
        """What happens at a step (from 0): T = 20 gives full steps 0 to 5, 10 and 15."""
        if step < self.warmup:
            return "plain"
        return "sparse" if (step - self.warmup) % self.interval else "cache"

    def half_width(self, tokens: int) -> int:
        """w // 2 of the band |i - j| <= w // 2, with w = int(s tokens)."""
        return tokens - 1 if self.keep == 1 else max(1, int(self.keep * tokens) // 2)

    def claims(self, family: Family) -> list[Claim]:
        return [Claim(site.path, "reuses", "map") for site in self.sites(family)]

    def sites(self, family: Family) -> list[Site]:
        """The attentions of the chosen layers."""
        return chosen(family, self.info.slug, ("self_attention", "joint_attention"), self.layers)

    def attach(self, pipeline: Any) -> Handle:
        family = anatomy.of(denoiser(pipeline))
        sites = self.sites(family)
        for site in sites:
            _require_plain(site)
        with ExitStack() as undo:
            plan = Plan(self, Clock(pipeline, undo), len(sites))
            for site in sites:
                own = cast(Any, site.module).processor
                # The hook that measures the grid stays behind: it changes nothing, others share it.
                ours = _processor(site, family.grid(site), Reshape(plan, site.path))
                plan.clock.put(site, Switch(plan, site.path, own, ours), undo)
            return Handle(undo.pop_all(), (self,), plan.clock.stats)


def _require_plain(site: Site) -> None:
    processor = cast(Any, site.module).processor
    if isinstance(processor, (Switch, nn.Module)):
        raise InputError(
            f"re-ttention can't be attached to {site.path}, whose {type(processor).__name__} isn't "
            "the model's own softmax attention; take off first what put it there."
        )


# The statistics -----------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What a cache step remembers of one attention.

    Attributes:
        rho: share of the kept keys in the full softmax, (batch, heads, queries, 1).
        residual: R, what the other keys add, (batch, heads, queries, channels).
    """

    rho: Tensor
    residual: Tensor


def statistics(full: Attended, sparse: Attended) -> Kept:
    """rho_i = sum_{j in S_i} e^{a_ij} / sum_j e^{a_ij} = exp(lse_S - lse); R = O - rho O_S."""
    # The two sums come from different products, whose rounding could lift rho above 1.
    rho = (sparse.lse - full.lse).exp().clamp(max=1)
    return Kept(rho, full.output - rho * sparse.output)


def reshaped(sparse: Tensor, kept: Kept) -> Tensor:
    """rho softmax_S(a) V + R; `sparse` is softmax_S(a) V, (batch, heads, queries, channels)."""
    return kept.rho * sparse + kept.residual


def ramped(kept: Kept, ramp: float, clamp: bool) -> Kept:
    """rho <- rho + lambda, clamped to 1."""
    rho = kept.rho + ramp
    return kept._replace(rho=rho.clamp(max=1) if clamp else rho)


def kept_keys(image: Heads, text: Heads | None, half: int) -> Attended:
    """Image queries on the keys they keep: a band of the image, and all of the prompt."""
    banded = banded_attention(image.query, image.key, image.value, half)
    if text is None:
        return banded
    return merged(banded, dense_attention(image.query, text.key, text.value))


# In the model -------------------------------------------------------------------------------------


class Plan:
    """What all attentions do at the running call, and the count of it."""

    def __init__(self, settings: Rettention, clock: Clock, sites: int) -> None:
        self.settings, self.clock = settings, clock
        clock.stats |= {"sites": sites, "full_steps": 0, "sparse_steps": 0}
        clock.on_call, clock.on_end = self.decide, self.count

    @property
    def mode(self) -> Mode:
        """Of the running call."""
        return cast(Mode, self.clock.plan)

    def decide(self) -> Mode:
        return self.settings.mode(self.clock.step)

    def count(self) -> None:
        """Count a step, behind its first call, by what the attentions did."""
        done = self.clock.done.values()
        if done and self.clock.call == 0:
            self.clock.stats["sparse_steps" if "reused" in done else "full_steps"] += 1


class Reshape:
    """The image queries of one attention at cache steps and at sparse steps."""

    def __init__(self, plan: Plan, path: str) -> None:
        self.plan, self.path = plan, path

    def __call__(self, image: Heads, text: Heads | None = None) -> Tensor:
        """Mixed image tokens, (batch, heads, tokens, channels), as the heads are."""
        settings, memory = self.plan.settings, self.plan.clock.kept
        sparse = kept_keys(image, text, settings.half_width(image.query.shape[-2]))
        dtype = image.value.dtype
        # A call that the step before didn't make has nothing to reuse.
        if self.plan.mode == "cache" or self.path not in memory:
            keys = (image.key, image.value) if text is None else all_keys(image, text)
            full = dense_attention(image.query, *keys)
            self.plan.clock.done[self.path] = "computed"
            rho, residual = statistics(full, sparse)
            memory[self.path] = Kept(rho.detach(), residual.detach().to(dtype))
            return full.output.to(dtype)
        self.plan.clock.done[self.path] = "reused"
        kept = memory[self.path]
        memory[self.path] = ramped(kept, settings.ramp, settings.clamp)
        return reshaped(sparse.output, kept).to(dtype)


class Switch:
    """An attention's processor: its own in the warm-up, bit for bit, and ours behind it."""

    def __init__(self, plan: Plan, path: str, own: Any, ours: nn.Module) -> None:
        self.plan, self.path, self.own, self.ours = plan, path, own, ours

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is not None:
            raise InputError(
                "re-ttention keeps a band of all image tokens and takes no attention mask; call "
                "the model without one."
            )
        processor = self.ours
        if self.plan.mode == "plain":
            self.ours.grid.require()  # later calls read it, and it's better to refuse the first
            processor, self.plan.clock.done[self.path] = self.own, "computed"
        return processor(attn, hidden_states, encoder_hidden_states, None, *args, **kwargs)


def _processor(site: Site, grid: Grid, reshape: Reshape) -> nn.Module:
    if site.kind == "self_attention":
        return ReshapedAttention(grid, reshape)
    return ReshapedJointAttention(grid, reshape)


class ReshapedAttention(Processor):
    """For attentions of the image alone."""

    def __init__(self, grid: Grid, reshape: Reshape) -> None:
        super().__init__(grid)
        self.reshape = reshape

    def mix(self, attn: nn.Module, hidden_states: Tensor) -> Tensor:
        return merge_heads(self.reshape(Heads(*projected(attn, hidden_states))))


class ReshapedJointAttention(JointProcessor):
    """For attentions of image and prompt; the prompt's queries keep all keys."""

    def __init__(self, grid: Grid, reshape: Reshape) -> None:
        super().__init__(grid)
        self.reshape = reshape

    def mix(self, image: Heads, text: Heads, text_wanted: bool) -> tuple[Tensor, Tensor | None]:
        y_text = None
        if text_wanted:
            y_text = F.scaled_dot_product_attention(text.query, *all_keys(image, text))
        return self.reshape(image, text), y_text
