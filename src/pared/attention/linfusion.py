"""LinFusion: 1 GPU, 1 Minute, 16K Image (arXiv 2409.02097, 2024).

Self-attention becomes normalised, non-causal linear attention with feature map ELU + 1, whose
queries and keys first pass a small residual MLP. Projections come from the teacher.

Implemented from the paper's equations; no code taken. Chosen here: the MLP's last layer starts at
zero, so that step 0 is plain ELU + 1 linear attention of the teacher's projections
(`zero_init=False` gives the random start).
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pared.anatomy import Grid, Site
from pared.attention.mixing import Processor, TokenMixer, projected, zero_
from pared.errors import InputError
from pared.info import Info
from pared.nn.layout import merge_heads
from pared.nn.linear_attention import clipped, full_precision

INFO = Info(
    slug="linfusion",
    title="LinFusion: 1 GPU, 1 Minute, 16K Image",
    arxiv="2409.02097",
    venue="2024",
    kind="conversion",
    families=("unet", "pixart", "dit", "sd3"),
    training=True,
    exact=False,
    maturity="partial",
    summary="ELU + 1 linear attention whose queries and keys pass a residual MLP",
    cls="LinFusion",
)


class LinFusion(TokenMixer):
    """Generalised linear attention of LinFusion, section 3."""

    info = INFO

    mid_dim_scale: int = Field(
        default=1, ge=1, description="hidden channels of the MLPs are width / mid_dim_scale"
    )
    zero_init: bool = Field(default=True, description="start the MLPs' last layer at zero")

    def processor(self, site: Site, grid: Grid) -> nn.Module:
        if site.width % self.mid_dim_scale:
            raise InputError(
                f"linfusion: mid_dim_scale={self.mid_dim_scale} doesn't divide the width "
                f"{site.width} of {site.path}."
            )
        return GeneralisedLinearAttention(self, site.width, grid)


class GeneralisedLinearAttention(Processor):
    """Y_i = phi(Q_i) S / z_i; S = mean_j phi(K_j)^T V_j, z_i = phi(Q_i) . mean_j phi(K_j) + eps."""

    def __init__(self, settings: LinFusion, width: int, grid: Grid) -> None:
        super().__init__(grid)
        self.query_map = residual_mlp(width, width // settings.mid_dim_scale, settings.zero_init)
        self.key_map = residual_mlp(width, width // settings.mid_dim_scale, settings.zero_init)

    def mix(self, attn: nn.Module, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        q, k, v = projected(attn, x + self.query_map(x), x + self.key_map(x), x)
        return merge_heads(normalised_attention(F.elu(q) + 1, F.elu(k) + 1, v))


def residual_mlp(width: int, hidden: int, zero_init: bool) -> nn.Sequential:
    """f(X) of X + f(X): Linear, LayerNorm, LeakyReLU, Linear."""
    last = nn.Linear(hidden, width)
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.LayerNorm(hidden),
        nn.LeakyReLU(0.01),
        zero_(last) if zero_init else last,
    )


def normalised_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-4) -> Tensor:
    """Linear attention with the mean of keys in the denominator.

    All tensors are (batch, heads, tokens, channels). The mean, not the sum, stands beside `eps`:
    that keeps its meaning when the number of tokens changes.
    """
    with full_precision(value):
        q, k, v = query.float(), key.float(), value.float()
        state = (k / k.shape[-2]).transpose(-1, -2) @ v
        z = q @ k.mean(dim=-2).unsqueeze(-1) + eps
        return clipped(q @ state / z, value.dtype)
