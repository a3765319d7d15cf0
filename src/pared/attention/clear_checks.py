"""What must hold of CLEAR without trained weights: its paper's mathematics.

Run by `pared check clear`.
"""

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pared import anatomy
from pared.anatomy import presets
from pared.attention.clear import (
    Clear,
    JointClear,
    Pooling,
    attended_pairs,
    attention_flops,
    attention_mask,
)
from pared.attention.joint import Heads
from pared.attention.patch_parallel import patch_attention
from pared.method import convert
from pared.nn.local_attention import Disk, local_attention_reference, tiled_attention

# FLUX.1-dev: heads x channels, text tokens.
WIDTH, TEXT = 3072, 512


def _heads(tokens: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Heads:
    """Random heads, (2, 3, tokens, 8), sharp enough that attention isn't a plain mean."""
    q, k, v = (torch.randn(2, 3, tokens, 8, generator=generator).to(dtype) for _ in range(3))
    return Heads(2 * q, k, v)


def _layer(settings: Clear, height: int, width: int, text: int) -> tuple[JointClear, Heads, Heads]:
    """A processor for a grid, and heads of random image and text tokens for it."""
    grid = anatomy.Grid()
    grid.height, grid.width = height, width
    generator = torch.Generator().manual_seed(0)
    processor = JointClear(settings, grid)
    return processor, _heads(height * width, generator), _heads(text, generator)


def _joint(image: Heads, text: Heads, mask: Tensor, more: Heads | None = None) -> Tensor:
    """Attention of text and image tokens under a whole mask; the text's results come first."""
    parts = [text, image] if more is None else [text, image, more]
    q = torch.cat([text.query, image.query], dim=-2)
    k, v = (torch.cat([getattr(p, name) for p in parts], dim=-2) for name in ("key", "value"))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def check_wide_disk() -> None:
    """With r above the diagonal every layer is the model's own: outputs within 1e-5.

    So it is through the tiles, which the layers then go round.
    """
    for name in ("toy:flux", "toy:sd3"):
        teacher = presets.build(name, device="cpu").eval()
        student = convert(copy.deepcopy(teacher), Clear(r=12))
        family = anatomy.of(teacher)
        generator = torch.Generator().manual_seed(0)
        example = family.example(height=14, width=18, text_tokens=5, generator=generator)
        with torch.no_grad():
            wanted, got = (family.denoise(m, *example) for m in (teacher, student))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    x = _heads(9 * 13, torch.Generator().manual_seed(0))
    wanted = F.scaled_dot_product_attention(x.query, x.key, x.value)
    got = tiled_attention(x.query, x.key, x.value, Disk(13, 15))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def check_mask() -> None:
    """The mask M is symmetric among image tokens, and its rows have the paper's lengths."""
    height, width, text = 19, 21, 3
    tokens = height * width
    middle = text + (height // 2) * width + width // 2
    for r, disk in ((1, 1), (2, 9), (4, 45), (8, 193)):
        mask = attention_mask(height, width, text, r)
        image = mask[text:, text:]
        assert torch.equal(image, image.T), f"r={r}: the image's part isn't symmetric"
        assert mask[middle].sum() == text + disk, f"r={r}: the disk holds {mask[middle].sum()}"
        assert (mask[:text].sum(dim=1) == text + tokens).all(), "a text query doesn't see all"
        assert mask.sum() == attended_pairs(r, height, width, text), f"r={r}: pairs are miscounted"
    alone = attention_mask(height, width, text, r=1)[text:, text:]
    assert torch.equal(alone, torch.eye(tokens, dtype=torch.bool)), "r=1 must see itself only"
    pooled = attention_mask(4, 8, text, r=2, pool=2)[:, text + 32 :]
    assert pooled.shape[1] == 8 and pooled[text:].all() and not pooled[:text].any()


def check_flops() -> None:
    """The formula gives every cell of the paper's table: FLOPs of one layer of FLUX.1-dev.

    Its Table 2 prints 80.6 for r = 16 at 1024, which its Table 7 rounds to 0.09T: 86.6 it is.
    """
    table = {  # pixels: full attention, r = 8, 16, 32, in the digits of the paper
        1024: ("260.9", "63.5", "86.6", "154.1"),
        2048: ("3507.9", "246.2", "352.6", "724.3"),
        4096: ("53604.4", "979.3", "1433.2", "3141.7"),
        8192: ("847.73e3", "3.92e3", "5.79e3", "13.09e3"),
    }
    for pixels, row in table.items():
        side = pixels // 16
        for r, printed in zip((2 * side, 8, 16, 32), row, strict=True):
            flops = attention_flops(attended_pairs(r, side, side, TEXT), WIDTH) / 1e9
            mantissa, _, exponent = printed.partition("e")
            last_digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
            # Rounded, and not always to the nearest: 13.08497T is printed as 13.09T.
            assert abs(flops - float(printed)) < 0.51 * last_digit, (
                f"{pixels} pixels, r={r}: {flops:.1f} GFLOP, the paper has {printed}"
            )


def check_locality() -> None:
    """A token that changes moves the outputs within its disk and the text's, and no other."""
    height, width, r, at = 12, 17, 4, 3 * 17 + 5
    processor, image, text = _layer(Clear(r=r), height, width, text=4)
    before = torch.cat(processor.mix(image, text, True), dim=-2)
    for x in (image.query, image.key, image.value):
        x[:, :, at] += 1
    after = torch.cat(processor.mix(image, text, True), dim=-2)
    moved = before.ne(after).any(dim=-1).flatten(0, 1).any(dim=0)
    disk = Disk(width, r).near(torch.tensor(at), torch.arange(height * width))
    assert torch.equal(moved[:-4], disk), "the outputs that moved aren't those of the disk"
    assert moved[-4:].all(), "a text output didn't notice"


def check_linear_cost() -> None:
    """Without text, four times the tokens have four times the pairs; sixteen times in full."""
    ratios = [attended_pairs(8, 2 * n, 2 * n) / attended_pairs(8, n, n) for n in (16, 64, 256, 512)]
    gaps = [abs(ratio - 4) for ratio in ratios]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.06, f"the ratios are {ratios}"
    full = attended_pairs(1000, 64, 64) / attended_pairs(1000, 32, 32)
    assert full == 16, f"full attention grows {full} times"


def check_pooling() -> None:
    """Pooled keys start as means, are seen by image tokens alone, and their weights learn."""
    processor, image, text = _layer(Clear(r=3, pool=2), 6, 8, text=4)
    pool = cast(Pooling, processor.seen.pool)
    means = F.avg_pool2d(image.key.transpose(-1, -2).reshape(6, 8, 6, 8), 2)
    means = means.reshape(2, 3, 8, 12).transpose(-1, -2)
    torch.testing.assert_close(pool(image.key, 6, 8), means, rtol=0, atol=1e-6)
    with torch.no_grad():
        pool.weight.copy_(torch.rand(2, 2, generator=torch.Generator().manual_seed(1)))
    pooled = Heads(image.query, pool(image.key, 6, 8), pool(image.value, 6, 8))
    wanted = _joint(image, text, attention_mask(6, 8, 4, r=3, pool=2), pooled)
    y = torch.cat(processor.mix(image, text, True)[::-1], dim=-2)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5)
    y.square().sum().backward()
    assert pool.weight.grad.ne(0).all(), "a weight of the pooling gets no gradient"
    model = presets.build("toy:flux", device="cpu")
    before = sum(p.numel() for p in model.parameters())
    added = sum(p.numel() for p in convert(model, Clear(pool=4)).parameters()) - before
    layers = len(anatomy.of(model).sites("joint_attention"))
    assert added == 16 * layers, f"{added} new weights in {layers} layers, not 16 in each"


def check_pooling_by_one() -> None:
    """Pooled by 1, with a disk of itself alone, an image token sees every image token."""
    processor, image, text = _layer(Clear(r=1, pool=1), 5, 6, text=4)
    value = image.value.requires_grad_(True)
    y, _ = processor.mix(image, text, False)
    (gradient,) = torch.autograd.grad(y[:, :, 7].sum(), value)
    assert gradient.ne(0).all(), "a token isn't seen"
    # Itself comes twice: as its disk, and as a pooled token.
    mask = torch.cat([attention_mask(5, 6, 4, r=1), torch.ones(34, 30, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(y, _joint(image, text, mask, image)[:, :, 4:], rtol=0, atol=1e-5)


def check_tiles() -> None:
    """Tiles give what the whole mask gives: outputs within 1e-5, gradients within 1e-4.

    On grids that are no squares, smaller than a tile, and no multiples of one; with more than 512
    keys to a tile, so that kernels that go by blocks meet blocks without a visible key.
    """
    for height, width, r in ((20, 33, 6), (5, 3, 2), (1, 40, 9), (17, 40, 12), (9, 9, 30)):
        generator = torch.Generator().manual_seed(0)
        image, text = _heads(height * width, generator), _heads(3, generator)
        inputs = (image.query, image.key, image.value, text.key, text.value)
        weights = torch.randn(image.query.shape, generator=generator)
        results = []
        for function in (tiled_attention, local_attention_reference):
            q, k, v, k_text, v_text = (x.clone().requires_grad_(True) for x in inputs)
            y = function(q, k, v, Disk(width, r), (k_text, v_text))
            gradients = torch.autograd.grad((y * weights).sum(), (q, k, v, k_text, v_text))
            results.append((y, gradients))
        (y, gradients), (wanted, wanted_gradients) = results
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5)
        for got, want in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def check_patches() -> None:
    """In patches image tokens stay the same within 1e-5; text tokens come near."""
    height, width, r = 14, 9, 4
    processor, image, text = _layer(Clear(r=r), height, width, text=5)
    wanted_image, wanted_text = processor.mix(image, text, True)
    errors = []
    for patches in (1, 2, 3):
        y_image, y_text = patch_attention(image, text, height, width, r, patches)
        torch.testing.assert_close(y_image, wanted_image, rtol=0, atol=1e-5)
        errors.append(float((y_text - wanted_text).norm() / wanted_text.norm()))
    assert errors[0] < 1e-6 and all(1e-3 < error < 1 for error in errors[1:]), errors
