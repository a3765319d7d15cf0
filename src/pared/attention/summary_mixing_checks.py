"""What must hold of SummaryMixing for image tokens without trained weights.

Run by `pared check summary-mixing-image`.
"""

import copy

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import presets
from pared.attention.summary_mixing import SummaryMixer, SummaryMixingImage
from pared.method import convert
from pared.nn.summary_mixing import SummaryMixing, chunk_mask, summary_mixing_reference


def _layers(
    settings: SummaryMixingImage, height: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module, Tensor]:
    """An attention of a toy PixArt, the same converted, as initialised, and random tokens."""
    torch.manual_seed(0)
    model = presets.build("toy:pixart", device="cpu").to(dtype)
    teacher = copy.deepcopy(anatomy.of(model).sites("self_attention")[0].module)
    convert(model, settings)
    site = anatomy.of(model).sites("self_attention")[0]
    site.module.processor.grid.height, site.module.processor.grid.width = height, width
    return teacher, site.module, torch.randn(2, height * width, site.width, dtype=dtype)


def check_reference() -> None:
    """The mixer equals its quadratic form within 1e-12, with and without masks."""
    torch.manual_seed(0)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    valid = torch.arange(30) < torch.tensor([[30], [17]])
    for mode, heads in (("full", 4), ("lite", 2), ("fast", 1)):
        mixer = SummaryMixing(16, mode, heads).double()
        for masks in ((None, None), (valid, None), (valid, chunk_mask(torch.arange(30) // 7, 2))):
            wanted = summary_mixing_reference(mixer, x, *masks)
            torch.testing.assert_close(mixer(x, *masks), wanted, rtol=0, atol=1e-12)


def check_start() -> None:
    """It starts as a weighted mean of the teacher's values: half over all, half over neighbours."""
    for mode in ("full", "lite", "fast"):
        _, attn, x = _layers(SummaryMixingImage(mode=mode, kernel=3), 6, 5)
        rows, columns = torch.arange(30) // 5, torch.arange(30) % 5
        beside = (rows[:, None] - rows).abs().maximum((columns[:, None] - columns).abs()) <= 1
        near = beside.double() * 0.5 / 9
        weights = near + (1 - near.sum(dim=1, keepdim=True)) / 30
        wanted = attn.to_out[0](weights @ attn.to_v(x))
        # The convolution's first weights are rounded to float32.
        torch.testing.assert_close(attn(x), wanted, rtol=0, atol=1e-7)


def check_equal_tokens() -> None:
    """Where all tokens are equal it starts as the softmax attention that it replaces."""
    teacher, attn, x = _layers(SummaryMixingImage(), 6, 5)
    x = x[:, :1].expand(-1, 30, -1)
    torch.testing.assert_close(attn(x), teacher(x), rtol=0, atol=1e-12)


def check_support() -> None:
    """A token hears its 3x3 neighbours one by one, and all others with one and the same weight."""
    _, attn, x = _layers(SummaryMixingImage(kernel=3), 7, 5)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = x[:1, :1].repeat(1, 35, 1).requires_grad_(True)  # equal tokens have equal gradients of s
    (gradient,) = torch.autograd.grad(attn(x)[0, 3 * 5 + 2].square().sum(), x)
    window = {r * 5 + c for r in (2, 3, 4) for c in (1, 2, 3)}
    outside = gradient[0, [i for i in range(35) if i not in window]]
    assert outside.abs().sum() > 0, "tokens beyond the window aren't heard"
    torch.testing.assert_close(outside, outside[:1].expand_as(outside), rtol=0, atol=1e-12)
    inside = gradient[0, sorted(window)] - outside[0]
    assert (inside.abs().sum(dim=-1) > 1e-6).all(), "a neighbour is heard no more than the others"


def check_parameters() -> None:
    """Extra parameters per block at d = 1152: (4 / n + 2) d^2 + 9 d, and 25 d of the convolution.

    Those of the mixer alone in mode lite: 2 d^2 / n + 2 d; in mode fast: 4 d^2 + 3 d.
    """
    for mode, wanted in (("full", 3_356_928), ("lite", 362_880), ("fast", 5_340_672)):
        with torch.device("meta"):
            processor = SummaryMixer(SummaryMixingImage(mode=mode), 1152, anatomy.Grid(2))
        count = sum(p.numel() for p in processor.parameters())
        assert count == wanted, f"{mode}: {count} extra parameters, the formula gives {wanted}"


def check_no_dead_branch() -> None:
    """Step 0 moves the mixer's last map and the convolution; after it both networks learn."""
    _, attn, x = _layers(SummaryMixingImage(), 6, 6, torch.float32)
    processor = attn.processor
    mixer = processor.mixer
    optimizer = torch.optim.SGD(attn.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (attn(x) - x).square().sum().backward()
        for part in (processor.near, mixer.c.of_local, mixer.c.of_summary):
            assert part.weight.grad.abs().sum() > 0, "a last layer gets no gradient"
        for part in (mixer.f[0], mixer.s[0]):
            moved = part.weight.grad.abs().sum() > 0
            assert moved == (step > 0), "the networks must learn from step 1 on"
        optimizer.step()


def check_half_precision() -> None:
    """bfloat16 and float16 outputs stay within 1e-2 of float32 at 16,384 tokens."""
    _, attn, _ = _layers(SummaryMixingImage(), 128, 128, torch.float32)
    x = torch.randn(1, 128 * 128, attn.to_q.in_features)
    with torch.no_grad():
        for parameter in attn.processor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        wanted = attn(x)
        for dtype in (torch.bfloat16, torch.float16):
            half = copy.deepcopy(attn).to(dtype)
            error = (half(x.to(dtype)).float() - wanted).norm() / wanted.norm()
            assert error < 1e-2, f"{dtype}: relative error {error:.4f}"
