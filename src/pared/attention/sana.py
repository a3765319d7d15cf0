"""SANA-style linear attention, as the EDiT paper compares against it.

SANA: arXiv 2410.10629, ICLR 2025.

Self-attention becomes plain ReLU linear attention on the teacher's projections; with `mix_ffn` the
feed-forward also becomes SANA's Mix-FFN, which brings back locality by a depthwise convolution. A
joint attention becomes linear over image and text together (SANA-MM-DiT in the EDiT paper).

Implemented from the papers' equations; no code taken. Chosen here: Mix-FFN starts from random
weights with a zero last layer, since a gated convolutional net can't take over the weights of a
plain MLP.
"""

from typing import Any, ClassVar, cast

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family, Grid, Site, SiteKind
from pared.attention.joint import Heads, JointProcessor, all_keys
from pared.attention.mixing import Processor, TokenMixer, projected, zero_
from pared.info import Info
from pared.method import Claim
from pared.nn.layout import merge_heads, to_map, to_tokens
from pared.nn.linear_attention import linear_attention

INFO = Info(
    slug="sana",
    title="SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers",
    arxiv="2410.10629",
    venue="ICLR 2025",
    kind="conversion",
    families=("pixart", "dit", "sd3", "flux", "unet"),
    training=True,
    exact=False,
    maturity="partial",
    summary="plain ReLU linear attention, optionally with a convolutional feed-forward",
    cls="Sana",
)


class Sana(TokenMixer):
    """ReLU linear attention, with Mix-FFN where wanted."""

    info = INFO
    kinds: ClassVar[tuple[SiteKind, ...]] = ("self_attention", "joint_attention")

    mix_ffn: bool = Field(default=False, description="replace the feed-forwards by Mix-FFN too")
    expansion: float = Field(
        default=2.5, gt=0, description="hidden width of Mix-FFN over the model's width"
    )

    def processor(self, site: Site, grid: Grid) -> nn.Module:
        joint = site.kind == "joint_attention"
        return ReluLinearJointAttention(grid) if joint else ReluLinearAttention(grid)

    def _feed_forwards(self, family: Family) -> list[Site]:
        if not self.mix_ffn:
            return []
        blocks = {site.block for site in self.sites(family)}
        found = family.sites("feed_forward")
        return [site for site in found if site.block in blocks and site.stream == "image"]

    def claims(self, family: Family) -> list[Claim]:
        return super().claims(family) + [
            Claim(s.path, "replaces") for s in self._feed_forwards(family)
        ]

    def convert(self, model: nn.Module) -> None:
        super().convert(model)
        family = anatomy.of(model)
        widths = {site.block: site.width for site in self.sites(family)}
        for site in self._feed_forwards(family):
            device = next(site.module.parameters()).device
            width = widths[site.block]
            new = MixFFN(width, int(self.expansion * width), family.grid(site))
            family.replace(site.path, new.to(device, cast(Any, family.model).dtype))


class ReluLinearAttention(Processor):
    """Q = ReLU(W_q X), K = ReLU(W_k X), V = W_v X, and their linear attention."""

    def mix(self, attn: nn.Module, hidden_states: Tensor) -> Tensor:
        q, k, v = projected(attn, hidden_states)
        return merge_heads(linear_attention(q.relu(), k.relu(), v))


class ReluLinearJointAttention(JointProcessor):
    """The same over image and text tokens alike."""

    def mix(self, image: Heads, text: Heads, text_wanted: bool) -> tuple[Tensor, Tensor | None]:
        key, value = all_keys(image, text)
        key = key.relu()
        y_image = linear_attention(image.query.relu(), key, value)
        y_text = linear_attention(text.query.relu(), key, value) if text_wanted else None
        return y_image, y_text


class MixFFN(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, SiLU gate, 1x1 back."""

    def __init__(self, width: int, hidden: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.expand = nn.Conv2d(width, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.contract = zero_(nn.Conv2d(hidden, width, 1))

    def forward(self, hidden_states: Tensor, *ignored: object, **also_ignored: object) -> Tensor:
        x = to_map(hidden_states, self.grid.height, self.grid.width)
        x, gate = self.depthwise(F.silu(self.expand(x))).chunk(2, dim=1)
        return to_tokens(self.contract(x * F.silu(gate)))
