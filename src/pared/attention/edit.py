"""EDiT: Efficient Diffusion Transformers with Linear Compressed Attention.

arXiv 2503.16726, ICCV 2025.

Every image self-attention becomes ReLU linear attention. Queries first pass a small residual
convolutional net (ConvFusion); keys and values are pooled four times by a strided depthwise
convolution (Spatial Compressor). Distilled from its teacher it keeps the pictures at a cost that is
linear in tokens.

Implemented from the paper; no code taken, none is released. Left open by the paper and chosen here:
r = 4, 32 groups, slope 0.01, biases everywhere, separate compressors for keys and values,
initialisation (projections from the teacher, ConvFusion's last layer zero, compressor an average),
loss weights 1 / 0.5 / 0.5 with the mean over layers (those of LinFusion's released training). Not
verified: quality at the paper's scale.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pared.anatomy import Grid, Site
from pared.attention.mixing import Processor, TokenMixer, largest_divisor, zero_
from pared.info import Headline, Info
from pared.nn.layout import merge_heads, split_heads, to_map, to_tokens
from pared.nn.linear_attention import linear_attention

INFO = Info(
    slug="edit",
    title="EDiT: Efficient Diffusion Transformers with Linear Compressed Attention",
    arxiv="2503.16726",
    venue="ICCV 2025",
    kind="conversion",
    families=("pixart", "dit", "sd3", "unet"),
    training=True,
    exact=False,
    maturity="faithful",
    summary="ReLU linear attention with convolutional queries and pooled keys and values",
    cls="EDiT",
    headlines=(
        Headline(
            key="speedup-1024",
            text="one call of PixArt-Sigma at 1024x1024, softmax over EDiT",
            paper=1.4,
            direction="higher",
            bound=1.4,
        ),
        Headline(
            key="speedup-2048",
            text="one call of PixArt-Sigma at 2048x2048, softmax over EDiT",
            paper=3.2,
            direction="higher",
            bound=3.2,
        ),
        Headline(
            key="speedup-4096",
            text="4096x4096, softmax over EDiT (here: one block)",
            paper=10.3,
            direction="higher",
            bound=10.3,
        ),
        Headline(
            key="distance-sana-over-edit",
            text="distance to the teacher, SANA-style linear attention over EDiT "
            "(paper: FID 8.43 / 7.06 at 512)",
            paper=1.19,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-linfusion-over-edit",
            text="distance to the teacher, LinFusion's map over EDiT "
            "(paper: FID 15.87 / 7.06 at 512)",
            paper=2.25,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-kv-over-edit",
            text="distance to the teacher, KV compression over EDiT "
            "(paper: FID 10.69 / 7.06 at 512)",
            paper=1.51,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-nocf-over-edit",
            text="distance to the teacher without ConvFusion over with it "
            "(paper: FID 14.53 / 7.06 at 512)",
            paper=2.06,
            direction="higher",
            bound=1.0,
        ),
    ),
)


class EDiT(TokenMixer):
    """Linear compressed attention, section 3 of the paper.

    The switches `query`, `key` and `value` are those of its ablation (Q, K, V columns): "cf" passes
    the tokens through ConvFusion, "sc" through the Spatial Compressor, "none" leaves them.
    """

    info = INFO

    r: int = Field(
        default=4, ge=1, description="channels of ConvFusion are width / r; must divide the width"
    )
    query: Literal["cf", "none"] = "cf"
    key: Literal["sc", "cf", "none"] = "sc"
    value: Literal["sc", "cf", "none"] = "sc"
    cf_norm_first: bool = Field(
        default=True, description="ConvFusion normalises before its activation"
    )
    groups: int = Field(default=32, ge=1, description="groups of ConvFusion's GroupNorm, at most")
    negative_slope: float = Field(default=0.01, ge=0, description="of ConvFusion's LeakyReLU")
    padding: Literal["zeros", "replicate", "reflect"] = Field(
        default="zeros",
        description="border of the Spatial Compressor; zeros darken border keys at the start",
    )

    @model_validator(mode="after")
    def _same_tokens(self) -> "EDiT":
        if (self.key == "sc") != (self.value == "sc"):
            raise ValueError(
                f"key={self.key} and value={self.value} would have different numbers of tokens; "
                "compress both with sc or neither"
            )
        return self

    def processor(self, site: Site, grid: Grid) -> nn.Module:
        if site.width % self.r:
            from pared.errors import InputError

            raise InputError(
                f"edit: r={self.r} doesn't divide the width {site.width} of {site.path}."
            )
        return LinearCompressedAttention(self, site.width, grid)


class ConvFusion(nn.Module):
    """U = X + C2(LeakyReLU(GN(C1(X)))): local detail for queries, through width / r channels."""

    def __init__(self, settings: EDiT, width: int) -> None:
        super().__init__()
        hidden = width // settings.r
        self.compress = nn.Conv2d(width, hidden, 3, padding=1)
        self.norm = nn.GroupNorm(largest_divisor(hidden, settings.groups), hidden)
        self.restore = zero_(nn.Conv2d(hidden, width, 1))
        self.norm_first, self.negative_slope = settings.cf_norm_first, settings.negative_slope

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, height, width in tokens) to the same shape."""
        h = self.compress(x)
        if self.norm_first:
            h = F.leaky_relu(self.norm(h), self.negative_slope)
        else:
            h = self.norm(F.leaky_relu(h, self.negative_slope))
        return x + self.restore(h)


class SpatialCompressor(nn.Conv2d):
    """phi_SC(X) = DW(W X + b): 3x3 depthwise convolution of stride 2, starting as an average."""

    def __init__(self, width: int, padding_mode: str) -> None:
        super().__init__(
            width, width, 3, stride=2, padding=1, groups=width, padding_mode=padding_mode
        )
        with torch.no_grad():
            self.weight.fill_(1 / 9)
            self.bias.zero_()


class LinearCompressedAttention(Processor):
    """y_i = Q_i (sum_j K_j^T V_j) / (Q_i . sum_j K_j), over compressed tokens j.

    Q = ReLU(W_q CF(X)), K = ReLU(SC(W_k X)), V = SC(W_v X). The factor 1/sqrt(channels) of softmax
    attention cancels.
    """

    def __init__(self, settings: EDiT, width: int, grid: Grid) -> None:
        super().__init__(grid)
        # Keys and values have their own compressors (the paper doesn't say whether they share one).
        self.query_fusion = ConvFusion(settings, width) if settings.query == "cf" else None
        self.key_fusion = ConvFusion(settings, width) if settings.key == "cf" else None
        self.value_fusion = ConvFusion(settings, width) if settings.value == "cf" else None
        self.key_compressor = (
            SpatialCompressor(width, settings.padding) if settings.key == "sc" else None
        )
        self.value_compressor = (
            SpatialCompressor(width, settings.padding) if settings.value == "sc" else None
        )

    def mix(self, attn: nn.Module, hidden_states: Tensor) -> Tensor:
        q, k, v = self.heads(attn, hidden_states)
        return merge_heads(linear_attention(q.relu(), k.relu(), v))

    def heads(self, attn: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before the ReLU, (batch, heads, tokens, channels)."""
        q = attn.to_q(self._fused(self.query_fusion, hidden_states))
        k = self._compressed(
            self.key_compressor, attn.to_k(self._fused(self.key_fusion, hidden_states))
        )
        v = self._compressed(
            self.value_compressor, attn.to_v(self._fused(self.value_fusion, hidden_states))
        )
        q, k, v = (split_heads(x, attn.heads) for x in (q, k, v))
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        return q, k, v

    def _fused(self, fusion: ConvFusion | None, x: Tensor) -> Tensor:
        return (
            x if fusion is None else to_tokens(fusion(to_map(x, self.grid.height, self.grid.width)))
        )

    def _compressed(self, compressor: SpatialCompressor | None, x: Tensor) -> Tensor:
        return (
            x
            if compressor is None
            else to_tokens(compressor(to_map(x, self.grid.height, self.grid.width)))
        )
