"""What must hold of LinFusion without trained weights: its paper's mathematics.

Run by `pared check linfusion`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pared import anatomy
from pared.anatomy import presets
from pared.attention.linfusion import LinFusion, normalised_attention
from pared.method import convert
from pared.nn.layout import merge_heads, split_heads
from pared.nn.linear_attention import linear_attention_reference

CHANNELS = 16


def _heads(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Positive features of queries and keys, and values, (1, 2, tokens, channels) in float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, tokens, CHANNELS, generator=generator, dtype=torch.float64)
    return F.elu(q) + 1, F.elu(k) + 1, v


def check_explicit_form() -> None:
    """It is the row-normalised N x N map of phi(Q) phi(K)^T times V, up to eps: 1e-4."""
    q, k, v = _heads(64)
    wanted = linear_attention_reference(q, k, v).float()
    torch.testing.assert_close(
        normalised_attention(q, k, v, eps=0).float(), wanted, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(normalised_attention(q, k, v).float(), wanted, atol=1e-3, rtol=0)


def check_normalisation() -> None:
    """Duplicated tokens change nothing, and equal values come out equal: pictures can grow."""
    q, k, v = _heads(20)
    wanted = normalised_attention(q, k, v)
    thrice = normalised_attention(q, k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1))
    torch.testing.assert_close(thrice, wanted, atol=1e-6, rtol=0)
    constant = normalised_attention(q, k, torch.full_like(v, 0.7))
    torch.testing.assert_close(constant, torch.full_like(v, 0.7), atol=1e-3, rtol=0)


def check_order_of_tokens() -> None:
    """No token comes before another: permuted tokens give permuted results."""
    attn, x = _layer()
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attn(x[:, order]), attn(x)[:, order], atol=1e-5, rtol=0)


def check_start() -> None:
    """With the last layer of the maps at zero it is ELU + 1 attention of the own projections."""
    attn, x = _layer()
    q, k, v = (split_heads(f(x), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
    y = normalised_attention(F.elu(q) + 1, F.elu(k) + 1, v)
    torch.testing.assert_close(attn(x), attn.to_out[0](merge_heads(y)), atol=1e-6, rtol=0)


def check_state_is_additive() -> None:
    """State and key mean of two parts of the picture combine to those of the whole."""
    q, k, v = _heads(30)
    parts = [(k[:, :, part], v[:, :, part]) for part in (slice(0, 12), slice(12, 30))]
    share = [part[0].shape[2] / 30 for part in parts]
    state = sum(s * (a / a.shape[2]).mT @ b for s, (a, b) in zip(share, parts, strict=True))
    mean = sum(s * a.mean(dim=2) for s, (a, _) in zip(share, parts, strict=True))
    y = q @ state / (q @ torch.as_tensor(mean).unsqueeze(-1) + 1e-4)
    torch.testing.assert_close(y.float(), normalised_attention(q, k, v).float(), atol=1e-5, rtol=0)


def check_parameters() -> None:
    """SD 1.5 gains 49,661,440 parameters; SDXL 410,265,600, or 25,797,600 with scale 16."""
    for preset, scale, layers, wanted in (
        ("sd1.5", 1, 16, 49_661_440),
        ("sdxl", 1, 70, 410_265_600),
        ("sdxl", 16, 70, 25_797_600),
    ):
        model = presets.build(preset, device="meta")
        before = sum(p.numel() for p in model.parameters())
        method = LinFusion(mid_dim_scale=scale)
        replaced = len(method.claims(anatomy.of(model)))
        assert replaced == layers, f"{preset}: {replaced} layers, not {layers}"
        convert(model, method)
        gained = sum(p.numel() for p in model.parameters()) - before
        assert gained == wanted, f"{preset}: {gained} more parameters, the paper's {wanted}"


def _layer() -> tuple[Any, Tensor]:
    """One converted attention of a toy U-Net, and random tokens for it."""
    torch.manual_seed(0)
    model = presets.build("toy:unet", device="cpu")
    convert(model, LinFusion())
    site = anatomy.of(model).sites("self_attention")[0]
    return site.module, torch.randn(2, 24, site.width)
