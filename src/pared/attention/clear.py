"""CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up.

arXiv 2412.16112, NeurIPS 2025.

Every image token attends to the text tokens and to the image tokens within a disk of radius r
around it; text tokens still attend to everything. Softmax, projections and positions stay those of
the model, so that there is nothing new to learn, and the cost becomes linear in image tokens. A
short distillation of the attention's projections brings back the teacher's pictures. With a small
disk, image tokens can see the whole picture besides, in pooled tokens (`pool`); that part of the
cost is quadratic, s^2 times smaller than before.

Implemented from the paper; no code taken. Left open by the paper and chosen here: r = 16, the
middle one of its three; attentions of the image alone (SD3.5-Medium's second ones, PixArt, DiT,
U-Nets) take the image's part of the mask; the length of the sequence in the proportional scale
counts image and text tokens, not the pooled ones. Healing compares every converted attention with
the teacher's, as the paper says (its released code: ten of FLUX's one-stream blocks), behind the
output projection where the attention has one. Sampling from coarse to fine above the model's own
resolution is `pared.upscaling`, `pared sample --scale`. Not verified: quality at the paper's scale.
"""

from math import isqrt, log
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pared.anatomy import Family, Grid, Site, SiteKind
from pared.attention.joint import Heads, JointProcessor, all_keys
from pared.attention.mixing import Processor, TokenMixer, projected
from pared.errors import InputError
from pared.info import Headline, Info
from pared.nn.layout import merge_heads
from pared.nn.local_attention import Disk, Shared, local_attention

INFO = Info(
    slug="clear",
    title="CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
    arxiv="2412.16112",
    venue="NeurIPS 2025",
    kind="conversion",
    families=("sd3", "flux", "pixart", "dit", "unet"),
    training=True,
    exact=False,
    maturity="faithful",
    summary="softmax attention of each image token within a disk, and with the text",
    cls="Clear",
    headlines=(
        Headline(
            key="flops-saved-8192",
            text="share of FLUX.1-dev's attention FLOPs saved at 8192x8192, r = 8",
            paper=0.995,
            direction="higher",
            bound=0.995,
        ),
        Headline(
            key="speedup-2048",
            text="sampling from FLUX.1-dev at 2048x2048, full attention over CLEAR with r = 8",
            paper=1.33,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="speedup-8192",
            text="sampling from FLUX.1-dev at 8192x8192, full attention over CLEAR with r = 8",
            paper=6.3,
            direction="higher",
            bound=3.0,
        ),
        Headline(
            key="distance-small-over-large",
            text="distance to the teacher after healing, r = 8 over r = 32, here r = 2 over r = 4 "
            "(paper: FID 13.07 / 8.85 at 1024)",
            paper=1.48,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-task-over-distilled",
            text="distance to the teacher, healed by the task alone over with both distillation "
            "terms, r = 8 (paper: FID 15.53 / 13.07 at 1024)",
            paper=1.19,
            direction="higher",
            bound=1.0,
        ),
    ),
)

# Tokens of the sequences that FLUX.1 was trained on: 64 x 64 of the image and 512 of the text.
TRAINED_TOKENS = 4608


class Clear(TokenMixer):
    """Attention within a disk, section 3 of the paper."""

    info = INFO
    kinds: ClassVar[tuple[SiteKind, ...]] = ("joint_attention", "self_attention")

    r: int = Field(default=16, ge=1, description="radius of the disk in tokens; 8, 16 or 32")
    pool: int = Field(
        default=0,
        ge=0,
        description="image tokens also see the whole image pooled by this factor per side (the "
        "paper's s, 4 there; for r of 8 or 16); 0: they don't",
    )
    proportional: bool = Field(
        default=False,
        description="scale products by the length of the sequence too; for FLUX above the "
        "resolution it was trained at",
    )

    def processor(self, site: Site, grid: Grid) -> nn.Module:
        return JointClear(self, grid) if site.kind == "joint_attention" else ImageClear(self, grid)

    def trainable(self, family: Family) -> tuple[str, ...]:
        """What the paper trains, as glob patterns of parameter names.

        Those are the image's projections of every converted attention (in a one-stream block, both
        streams') and the weights of the pooling; the text's own projections and all norms are
        frozen.
        """
        parts = ("to_q", "to_k", "to_v", "to_out", "processor")
        return tuple(f"{site.path}.{part}.*" for site in self.sites(family) for part in parts)


class JointClear(JointProcessor):
    """The processor of an attention of image and text."""

    def __init__(self, settings: Clear, grid: Grid) -> None:
        super().__init__(grid)
        self.seen = Neighbourhood(settings)

    def mix(self, image: Heads, text: Heads, text_wanted: bool) -> tuple[Tensor, Tensor | None]:
        scale = self.seen.scale(image, text)
        y_text = None
        if text_wanted:
            y_text = F.scaled_dot_product_attention(text.query, *all_keys(image, text), scale=scale)
        return self.seen(image, (text.key, text.value), self.grid, scale), y_text


class ImageClear(Processor):
    """The processor of an attention of the image alone."""

    def __init__(self, settings: Clear, grid: Grid) -> None:
        super().__init__(grid)
        self.seen = Neighbourhood(settings)

    def mix(self, attn: nn.Module, hidden_states: Tensor) -> Tensor:
        image = Heads(*projected(attn, hidden_states))
        return merge_heads(self.seen(image, None, self.grid, self.seen.scale(image)))


class Neighbourhood(nn.Module):
    """What image tokens see: their disk, the text, and the pooled image where wanted."""

    def __init__(self, settings: Clear) -> None:
        super().__init__()
        self.r, self.proportional = settings.r, settings.proportional
        self.pool = Pooling(settings.pool) if settings.pool else None

    def forward(self, image: Heads, text: Shared | None, grid: Grid, scale: float | None) -> Tensor:
        """Mixed image tokens, (batch, heads, tokens, channels).

        Args:
            image: heads of the image tokens, in raster order of the grid.
            text: keys and values of the text tokens, if there are any.
            grid: height and width of the image in tokens.
            scale: of the products.
        """
        shared = [] if text is None else [text]
        if self.pool is not None:
            # Of keys that carry their positions.
            key, value = (self.pool(x, grid.height, grid.width) for x in (image.key, image.value))
            shared.append((key, value))
        seen = [torch.cat(x, dim=-2) for x in zip(*shared, strict=True)]
        return local_attention(
            image.query,
            image.key,
            image.value,
            Disk(grid.width, self.r),
            (seen[0], seen[1]) if seen else None,
            scale,
        )

    def scale(self, image: Heads, text: Heads | None = None) -> float | None:
        """sqrt(log_4608(tokens) / channels), where wanted; None is 1 / sqrt(channels)."""
        if not self.proportional:
            return None
        tokens = image.key.shape[-2] + (0 if text is None else text.key.shape[-2])
        return proportional_scale(tokens, image.key.shape[-1], pooled=self.pool is not None)


class Pooling(nn.Module):
    """Weighted sums of s x s cells; one weight per place in a cell, starting as the mean."""

    def __init__(self, s: int) -> None:
        super().__init__()
        self.s = s
        self.weight = nn.Parameter(torch.full((s, s), 1 / s**2))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(batch, heads, height x width, channels) to as many tokens divided by s x s.

        Raises:
            InputError: a side of the grid isn't a multiple of s.
        """
        s = self.s
        if height % s or width % s:
            raise InputError(
                f"clear: pool={s} doesn't divide the image's {height} x {width} tokens; choose a "
                "picture size whose sides in tokens are multiples of it, or pool=0."
            )
        cells = x.unflatten(2, (height // s, s, width // s, s))
        return torch.einsum("bnysxtc,st->bnyxc", cells, self.weight).flatten(2, 3)


def proportional_scale(tokens: int, channels: int, pooled: bool) -> float:
    """sqrt(log_4608(L) / channels), with 10 L for L where there are pooled keys.

    Keeps the entropy of the softmax where it was at the length of training; equal to
    1 / sqrt(channels) there.

    Args:
        tokens: L, image and text tokens of the sequence.
        channels: per head.
        pooled: whether there are pooled keys.
    """
    return (log(10 * tokens if pooled else tokens, TRAINED_TOKENS) / channels) ** 0.5


# What it costs ------------------------------------------------------------------------------------


def attended_pairs(r: int, height: int, width: int, text: int = 0) -> int:
    """Pairs of query and key that are computed in a layer, without pooled keys.

    Args:
        r: radius in tokens.
        height: of the image in tokens.
        width: likewise.
        text: tokens.
    """
    disk = 0
    for dy in range(1 - min(r, height), min(r, height)):
        # An offset (dy, dx) fits (height - |dy|)(width - |dx|) times; summed over |dx| <= most.
        most = min(isqrt(r**2 - 1 - dy**2), width - 1)
        disk += (height - abs(dy)) * ((2 * most + 1) * width - most * (most + 1))
    return disk + 2 * height * width * text + text**2


def attention_flops(pairs: int, width: int) -> int:
    """FLOPs of a layer's two products for so many pairs; `width` is heads x channels per head."""
    return 4 * pairs * width


def attention_mask(height: int, width: int, text: int, r: int, pool: int = 0) -> Tensor:
    """The whole mask M, True where a query sees a key. Quadratic; for tests.

    Queries are the text's tokens, then the image's; keys likewise, then the pooled ones.
    """
    tokens = height * width
    positions = torch.arange(tokens)
    mask = torch.ones(text + tokens, text + tokens, dtype=torch.bool)
    mask[text:, text:] = Disk(width, r).near(positions[:, None], positions)
    if pool:
        pooled = torch.ones(text + tokens, tokens // pool**2, dtype=torch.bool)
        pooled[:text] = False
        mask = torch.cat([mask, pooled], dim=1)
    return mask
