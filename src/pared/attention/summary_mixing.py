"""SummaryMixing for image tokens: a mean over the picture beside a convolution.

arXiv 2307.07421, Interspeech 2024.

Every image self-attention becomes the sum of three parts: the mean of all values, a depthwise
convolution of each value's neighbourhood, and SummaryMixing, which merges each token with a learned
mean over all tokens. The cost is linear in tokens; no token is compared with another.

Implemented from the paper's equations; no code taken. No paper has tried it: SummaryMixing was made
for speech, where trained attention maps are close to uniform, and it needs local mixing beside it,
which the convolution of a speech block is. Mode `expdecay`, quadratic in tokens, is left out.

Chosen here: all that stands around the mixer. The values stay the teacher's, V = W_v X, and with
them its output projection, which was trained on weighted means of just these values. The
convolution sees V - mean(V), so that the zeros beyond the border stand for the mean. Its weights
start equal, with the sum 1/2, and SummaryMixing starts as nothing (c = 0). So every output starts
as a weighted mean of the teacher's values, half of it over all tokens and half over the
neighbourhood: between a layer that attends everywhere and one that attends nearby. Eight heads as
in the paper's Conformers, whose blocks have a convolution too; a window of 5 x 5. The projections
of queries and keys are no longer called, but stay in the model.

Not verified: any use beyond toys. On one distilled toy layer it ends further from its teacher than
linear attention does.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pared.anatomy import Family, Grid, Site
from pared.attention.mixing import Processor, TokenMixer
from pared.errors import InputError
from pared.info import Info
from pared.method import Claim
from pared.nn.layout import to_map, to_tokens
from pared.nn.summary_mixing import SummaryMixing, mean_of, summed

INFO = Info(
    slug="summary-mixing-image",
    title="SummaryMixing: A Linear-Complexity Alternative to Self-Attention for Speech Recognition "
    "and Understanding (for images)",
    arxiv="2307.07421",
    venue="Interspeech 2024",
    kind="conversion",
    families=("pixart", "dit", "unet", "sd3"),
    training=True,
    exact=False,
    maturity="experimental",
    summary="a mean over all tokens beside a depthwise convolution, no attention",
    cls="SummaryMixingImage",
)


class SummaryMixingImage(TokenMixer):
    """SummaryMixing beside a depthwise convolution on the token grid."""

    info = INFO

    mode: Literal["full", "lite", "fast"] = Field(
        default="full",
        description="full; lite adds the learned mean as it is, without merging it with the token; "
        "fast has one linear map instead of two networks",
    )
    heads: int | None = Field(
        default=None,
        ge=1,
        description="blocks of the mixer's block-diagonal maps; must divide all widths; None means "
        "8, and none in mode fast",
    )
    hidden: int | None = Field(
        default=None,
        ge=1,
        description="channels between the two layers of either network; None means the "
        "attention's width, here and below",
    )
    local: int | None = Field(default=None, ge=1, description="channels of the local network")
    summary: int | None = Field(default=None, ge=1, description="channels of the learned mean")
    kernel: int = Field(
        default=5,
        ge=1,
        description="side of the convolution's window, in tokens; odd; 1 leaves the neighbours out",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "SummaryMixingImage":
        if self.kernel % 2 == 0:
            raise ValueError(
                f"kernel={self.kernel} has no token in its middle; make it odd, such as 3 or 5"
            )
        unused = {"lite": ("local", "summary"), "fast": ("heads", "hidden")}.get(self.mode, ())
        for name in unused:
            if getattr(self, name) is not None:
                raise ValueError(f"mode={self.mode} has no {name}; leave {name} out, or use full")
        return self

    def claims(self, family: Family) -> list[Claim]:
        for site in self.sites(family):
            sizes = {
                site.width,
                *(size for size in (self.hidden, self.local, self.summary) if size),
            }
            if bad := [size for size in sorted(sizes) if size % self.blocks]:
                raise InputError(
                    f"{self.info.slug}: heads={self.blocks} doesn't divide the width {bad[0]} of "
                    f"the mixer in {site.path}."
                )
        return super().claims(family)

    @property
    def blocks(self) -> int:
        """Blocks of the mixer's linear maps."""
        return self.heads or (1 if self.mode == "fast" else 8)

    def processor(self, site: Site, grid: Grid) -> nn.Module:
        return SummaryMixer(self, site.width, grid)


class SummaryMixer(Processor):
    """Y = mean(V) + DW(V - mean(V)) + SM(X), V = W_v X."""

    def __init__(self, settings: SummaryMixingImage, width: int, grid: Grid) -> None:
        super().__init__(grid)
        self.mixer = SummaryMixing(
            width,
            settings.mode,
            settings.blocks,
            settings.hidden,
            settings.local,
            settings.summary,
            output=width,
        ).start_at_zero()
        k = settings.kernel
        self.near = nn.Conv2d(width, width, k, padding=k // 2, groups=width, bias=False)
        with torch.no_grad():
            self.near.weight.fill_(0.5 / k**2)

    def mix(self, attn: nn.Module, hidden_states: Tensor) -> Tensor:
        v = attn.to_v(hidden_states)
        everywhere = mean_of(summed(v), v.dtype)
        deviation = to_map(v - everywhere, self.grid.height, self.grid.width)
        return everywhere + to_tokens(self.near(deviation)) + self.mixer(hidden_states)
