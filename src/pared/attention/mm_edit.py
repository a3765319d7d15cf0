"""MM-EDiT: EDiT's hybrid of linear and softmax attention for multimodal diffusion transformers.

arXiv 2503.16726, ICCV 2025.

Of the joint softmax of image and prompt only the image-to-image block grows with the square of the
resolution. That block becomes EDiT's linear compressed attention; the three blocks that the prompt
takes part in stay softmax attention. The two results of an image token are weighed by the share of
image tokens among all tokens.

Implemented from the paper; no code taken, none is released. Left open by the paper and chosen here:
the softmax blocks see queries and keys before the ReLU (`softmax_features`); the teacher's RMSNorm
of queries and keys stays, after ConvFusion and Spatial Compressor; the image-only second attention
of SD3.5-Medium becomes EDiT; rotary positions (FLUX) are applied before the ReLU, to compressed
keys at the middle of their window; everything else as in `edit`. Not verified: quality at the
paper's scale; and no single toy shows the prompt's row below 0.7 of fully linear attention's error
with equal image rows (flat logits show the one, sharp ones the other).
"""

from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pared.anatomy import Family, Grid, Site, SiteKind
from pared.attention.edit import EDiT, LinearCompressedAttention
from pared.attention.joint import Heads, JointProcessor, all_keys
from pared.info import Headline, Info
from pared.nn.linear_attention import full_precision, linear_attention
from pared.nn.rotary import Rotary, rotate

INFO = Info(
    slug="mm-edit",
    title="EDiT: Efficient Diffusion Transformers with Linear Compressed Attention (MM-EDiT)",
    arxiv="2503.16726",
    venue="ICCV 2025",
    kind="conversion",
    families=("sd3", "flux"),
    training=True,
    exact=False,
    maturity="faithful",
    summary="linear attention among image tokens, softmax wherever the prompt takes part",
    cls="MMEDiT",
    headlines=(
        Headline(
            key="speedup-1024",
            text="one call of SD3.5-Medium at 1024x1024, softmax over MM-EDiT",
            paper=2.2,
            direction="higher",
            bound=2.2,
        ),
        Headline(
            key="distance-sana-over-mm-edit",
            text="distance to the teacher, fully linear joint attention with Mix-FFN over MM-EDiT "
            "(paper: FID 14.94 / 11.60)",
            paper=1.29,
            direction="higher",
            bound=1.0,
        ),
    ),
)


class MMEDiT(EDiT):
    """Hybrid attention, section 4 of the paper, in joint attentions; EDiT in image-only ones."""

    info = INFO
    kinds: ClassVar[tuple[SiteKind, ...]] = ("joint_attention", "self_attention")

    weight: Literal["approximate", "exact"] = Field(
        default="approximate",
        description="of the linear part: the share of image tokens, or that of the attention's "
        "denominators",
    )
    count: Literal["full", "compressed"] = Field(
        default="full", description="image tokens in the approximate weight"
    )
    softmax_features: Literal["before", "after"] = Field(
        default="before", description="what the softmax blocks see: before or after the ReLU"
    )

    def sites(self, family: Family) -> list[Site]:
        """The attentions of the chosen layers, in models that have joint ones."""
        return super().sites(family) if family.sites("joint_attention") else []

    def processor(self, site: Site, grid: Grid) -> nn.Module:
        linear = super().processor(site, grid)
        if site.kind == "self_attention":
            return linear
        return HybridAttention(self, linear, grid)


class HybridAttention(JointProcessor):
    """Y_I = eta A_lin(Q_I, K_I, V_I) + (1 - eta) A(Q_I, K_P, V_P); Y_P = A(Q_P, K_all, V_all).

    A is softmax attention and A_lin ReLU linear attention, both normalised. Q_I comes from
    ConvFusion, K_I and V_I from the Spatial Compressor. eta is N_I / (N_I + N_P), or exactly the
    share of the image's part in the sum of both denominators.
    """

    def __init__(self, settings: MMEDiT, linear: nn.Module, grid: Grid) -> None:
        super().__init__(grid)
        self.settings, self.linear = settings, linear

    def image_heads(self, attn: Any, x: Tensor, rotary: Rotary | None) -> Heads:
        q, k, v = cast(LinearCompressedAttention, self.linear).heads(attn, x)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, self._of_keys(rotary, k.shape[-2]))
        return Heads(q, k, v)

    def _of_keys(self, rotary: Rotary, keys: int) -> Rotary:
        """The rotations of the keys: those of the tokens in the middle of their windows."""
        tokens = torch.arange(self.grid.tokens, device=rotary.cos.device)
        if keys == len(tokens):
            return rotary
        return rotary.at(tokens.view(self.grid.height, self.grid.width)[::2, ::2].flatten())

    def mix(self, image: Heads, text: Heads, text_wanted: bool) -> tuple[Tensor, Tensor | None]:
        q, k = image.query.relu(), image.key.relu()
        soft = Heads(q, k, image.value) if self.settings.softmax_features == "after" else image
        y_text = None
        if text_wanted:
            y_text = F.scaled_dot_product_attention(text.query, *all_keys(soft, text))
        of_image = linear_attention(q, k, image.value)
        if text.key.shape[-2] == 0:  # a softmax over nothing is not a number
            return of_image, y_text
        of_text = F.scaled_dot_product_attention(soft.query, text.key, text.value)
        # By the text's part: at high resolution eta is so near 1 that bfloat16 can't tell.
        share = self._share(q, k, soft.query, text.key).to(of_image.dtype)
        return torch.lerp(of_image, of_text, share), y_text

    def _share(self, q: Tensor, k: Tensor, soft_query: Tensor, text_key: Tensor) -> Tensor:
        """1 - eta, the weight of the text's part: a scalar, or (batch, heads, queries, 1)."""
        if self.settings.weight == "exact":
            return exact_share(q, k, soft_query, text_key)
        # A tensor, not a number: a compiled graph then serves every resolution.
        image = self.grid.tokens if self.settings.count == "full" else k.shape[-2]
        text = text_key.shape[-2]
        return q.new_tensor(text / (image + text), dtype=torch.float32)


# Their products with the prompt are the one map that the exact weight makes.
QUERIES_AT_ONCE = 4096


def exact_share(q: Tensor, k: Tensor, soft_query: Tensor, text_key: Tensor) -> Tensor:
    """Z / (S + Z): the softmax denominator Z over the prompt against the linear denominator S.

    In logarithms, sigmoid(log Z - log S), since Z is a sum of exponentials that half precision
    can't hold.

    Args:
        q: non-negative features of the image's queries, (batch, heads, queries, channels).
        k: non-negative features of the image's keys, (batch, heads, keys, channels).
        soft_query: the queries of the softmax over the prompt, shaped like `q`.
        text_key: the prompt's keys, (batch, heads, prompt tokens, channels).

    Returns:
        (batch, heads, queries, 1), float32 at least.
    """
    with full_precision(q):
        precise = torch.promote_types(q.dtype, torch.float32)
        sum_k, text_key = k.to(precise).sum(dim=-2).unsqueeze(-1), text_key.to(precise)
        parts = []
        for some_q, some_soft in zip(
            q.split(QUERIES_AT_ONCE, -2), soft_query.split(QUERIES_AT_ONCE, -2), strict=True
        ):
            s = some_q.to(precise) @ sum_k
            logits = some_soft.to(precise) @ text_key.mT * soft_query.shape[-1] ** -0.5
            # A query without features has S = 0; the floor keeps its gradient finite.
            log_s = s.clamp(min=1e-30).log()
            parts.append(torch.sigmoid(logits.logsumexp(dim=-1, keepdim=True) - log_s))
        return torch.cat(parts, dim=-2)
