"""Key-value token compression of PixArt-Sigma, as EDiT compares against it.

arXiv 2403.04692, ECCV 2024.

Softmax attention stays; its keys and values are pooled k times per side by a depthwise convolution
that starts as an average, with a LayerNorm behind. Cheaper by k^2, still quadratic.

Implemented from the paper; no code taken. As in the paper one convolution serves keys and values.
Chosen here: the LayerNorm's place (after pooling the tokens, before the projections) and its start
as (1, 0).
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pared.anatomy import Grid, Site
from pared.attention.mixing import Processor, TokenMixer, projected
from pared.info import Info
from pared.nn.layout import merge_heads, to_map, to_tokens

INFO = Info(
    slug="kv-compression",
    title="PixArt-Sigma: Weak-to-Strong Training of Diffusion Transformer for 4K "
    "Text-to-Image Generation",
    arxiv="2403.04692",
    venue="ECCV 2024",
    kind="conversion",
    families=("pixart", "dit", "sd3", "unet"),
    training=True,
    exact=False,
    maturity="partial",
    summary="softmax attention over keys and values pooled by a strided depthwise convolution",
    cls="KVCompression",
)


class KVCompression(TokenMixer):
    """Token compression of keys and values, section 3.3 of PixArt-Sigma."""

    info = INFO

    k: int = Field(default=2, ge=2, description="side of the pooling window and its stride")

    def processor(self, site: Site, grid: Grid) -> nn.Module:
        return CompressedSoftmaxAttention(site.width, self.k, grid)


class CompressedSoftmaxAttention(Processor):
    """softmax(Q K'^T / sqrt(channels)) V' with K', V' from pooled tokens."""

    def __init__(self, width: int, k: int, grid: Grid) -> None:
        super().__init__(grid)
        self.pool = nn.Conv2d(width, width, k, stride=k, groups=width)
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            self.pool.weight.fill_(1 / k**2)
            self.pool.bias.zero_()

    def mix(self, attn: nn.Module, hidden_states: Tensor) -> Tensor:
        pooled = self._pooled(hidden_states)
        q, k, v = projected(attn, hidden_states, pooled, pooled)
        return merge_heads(F.scaled_dot_product_attention(q, k, v))

    def _pooled(self, x: Tensor) -> Tensor:
        height, width, k = self.grid.height, self.grid.width, self.pool.stride[0]
        # Repeat the border where the window doesn't fit, so that no token is lost and none is
        # darkened.
        x = F.pad(to_map(x, height, width), (0, -width % k, 0, -height % k), mode="replicate")
        return self.norm(to_tokens(self.pool(x)))
