"""What must hold of EDiT without trained weights: its paper's mathematics.

Run by `pared check edit`.
"""

import copy

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import presets
from pared.attention.edit import EDiT, LinearCompressedAttention
from pared.method import convert
from pared.nn.layout import merge_heads, split_heads
from pared.nn.linear_attention import linear_attention, linear_attention_reference


def _layer(settings: EDiT, height: int, width: int, dtype: torch.dtype = torch.float64):
    """One converted attention of a toy PixArt, as initialised, and random tokens for it."""
    torch.manual_seed(0)
    model = presets.build("toy:pixart", device="cpu").to(dtype)
    convert(model, settings)
    site = anatomy.of(model).sites("self_attention")[0]
    site.module.processor.grid.height, site.module.processor.grid.width = height, width
    return site.module, torch.randn(2, height * width, site.width, dtype=dtype)


def check_initial_query() -> None:
    """At the start ConvFusion changes nothing: Q = ReLU(W_q X)."""
    attn, x = _layer(EDiT(), 6, 5)
    processor = attn.processor
    torch.testing.assert_close(processor._fused(processor.query_fusion, x), x, rtol=0, atol=0)


def check_plain_linear_attention() -> None:
    """With every switch off the layer is ReLU linear attention: its N x N form within 1e-10."""
    attn, x = _layer(EDiT(query="none", key="none", value="none"), 6, 5)
    q, k, v = (split_heads(f(x), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
    wanted = attn.to_out[0](merge_heads(linear_attention_reference(q.relu(), k.relu(), v)))
    torch.testing.assert_close(attn(x), wanted, rtol=0, atol=1e-10)


def check_weights_are_a_mean() -> None:
    """The weights are non-negative and sum to one: outputs stay within the range of the values."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8).relu() if n else None for n in (20, 12, 0))
    v = torch.randn(2, 3, 12, 8)
    y = linear_attention(q, k, v)
    low, high = v.amin(dim=-2, keepdim=True), v.amax(dim=-2, keepdim=True)
    assert ((y >= low - 1e-5) & (y <= high + 1e-5)).all(), "an output left the range of the values"
    constant = linear_attention(q, k, torch.full_like(v, 0.7))
    torch.testing.assert_close(constant, torch.full_like(constant, 0.7), rtol=0, atol=1e-5)
    silent = linear_attention(torch.zeros_like(q), k, v)
    assert (silent == 0).all(), "a query without features must give zero"


def check_parameters() -> None:
    """Extra parameters per block: 3,342,816 at d = 1152, r = 4.

    With m = d / r: (9d m + m) + 2m + (m d + d) + 2 (9d + d).
    """
    for r, wanted in ((4, 3_342_816), (8, 1_683_504)):
        with torch.device("meta"):
            processor = LinearCompressedAttention(EDiT(r=r), 1152, anatomy.Grid(2))
        count = sum(p.numel() for p in processor.parameters())
        assert count == wanted, f"r={r}: {count} extra parameters, the formula gives {wanted}"


def check_support() -> None:
    """A query sees its 3x3 neighbourhood, a compressed key its 3x3 window of stride 2."""
    attn, x = _layer(EDiT(), 7, 5)
    processor = attn.processor
    nn.init.normal_(processor.query_fusion.restore.weight)
    # GroupNorm ties the whole grid together through its statistics; the claim is about the
    # convolution.
    processor.query_fusion.norm = nn.Identity()
    x = x[:1].requires_grad_(True)
    fused = processor._fused(processor.query_fusion, x)
    _assert_window(fused[0, 3 * 5 + 2].sum(), x, {(r, c) for r in (2, 3, 4) for c in (1, 2, 3)}, 5)
    compressed = processor._compressed(processor.key_compressor, x)
    assert compressed.shape[1] == 4 * 3, (
        f"a 7x5 grid must compress to 4x3 tokens, not {compressed.shape[1]}"
    )
    _assert_window(
        compressed[0, 1 * 3 + 1].sum(), x, {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}, 5
    )


def _assert_window(output: Tensor, x: Tensor, wanted: set[tuple[int, int]], width: int) -> None:
    (gradient,) = torch.autograd.grad(output, x)
    seen = {divmod(int(i), width) for i in gradient[0].abs().sum(-1).nonzero().flatten()}
    assert seen == wanted, f"depends on tokens {sorted(seen)}, not on {sorted(wanted)}"


def check_no_dead_branch() -> None:
    """Step 0 moves ConvFusion's last layer; after it the first layer learns too."""
    attn, x = _layer(EDiT(), 6, 6, torch.float32)
    fusion = attn.processor.query_fusion
    optimizer = torch.optim.SGD(attn.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        attn(x).pow(2).sum().backward()
        first, last = (
            fusion.compress.weight.grad.abs().sum(),
            fusion.restore.weight.grad.abs().sum(),
        )
        assert last > 0, "ConvFusion's last layer gets no gradient"
        assert (first > 0) == (step > 0), "ConvFusion's first layer must learn from step 1 on"
        optimizer.step()


def check_half_precision() -> None:
    """bfloat16 and float16 outputs stay within 1e-2 of float32 at 16,384 tokens."""
    attn, _ = _layer(EDiT(), 128, 128, torch.float32)
    x = torch.randn(1, 128 * 128, attn.to_q.in_features)
    with torch.no_grad():
        wanted = attn(x)
        for dtype in (torch.bfloat16, torch.float16):
            half = copy.deepcopy(attn).to(dtype)
            error = (half(x.to(dtype)).float() - wanted).norm() / wanted.norm()
            assert error < 1e-2, f"{dtype}: relative error {error:.4f}"
