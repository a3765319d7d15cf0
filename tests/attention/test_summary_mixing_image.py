"""SummaryMixing for image tokens: what ships as checks runs here, and what is special to it."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention import summary_mixing_checks
from pared.attention.edit import EDiT
from pared.attention.mixing import TokenMixer
from pared.attention.summary_mixing import SummaryMixingImage
from pared.errors import InputError
from pared.method import stack_of

CHECKS = [f for name, f in inspect.getmembers(summary_mixing_checks) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


# Models -----------------------------------------------------------------------------------------


def test_full_model_parameters():
    model = presets.build("pixart-sigma", device="meta")
    before = sum(p.numel() for p in model.parameters())
    pared.convert(model, SummaryMixingImage())
    assert sum(p.numel() for p in model.parameters()) - before == 28 * 3_356_928


def test_it_serves_the_attention_of_the_image_alone():
    model = pared.convert(presets.build("toy:sd3", device="cpu"), SummaryMixingImage())
    (name,) = (name for name in model.state_dict() if name.endswith(".processor.near.weight"))
    assert name.startswith("transformer_blocks.0.attn2.")
    flux = presets.build("toy:flux", device="meta")
    with pytest.raises(InputError, match="finds no site"):
        pared.convert(flux, SummaryMixingImage())


@pytest.mark.parametrize("mode", ["full", "lite", "fast"])
@pytest.mark.parametrize(("height", "width"), [(7, 5), (1, 9)])
def test_any_mode_on_any_grid(mode, height, width):
    method = SummaryMixingImage(mode=mode)
    model = pared.convert(presets.build("toy:pixart", device="cpu"), method)
    family = anatomy.of(model)
    example = family.example(height=2 * height, width=2 * width)
    output = family.denoise(model, *example)
    assert output.shape == example[0].shape and output.isfinite().all()


def test_the_teachers_weights_stay():
    teacher = presets.build("toy:pixart", device="cpu")
    student = pared.convert(copy.deepcopy(teacher), SummaryMixingImage(mode="fast")).state_dict()
    for name, value in teacher.state_dict().items():
        assert torch.equal(student[name], value), name


# Cost -------------------------------------------------------------------------------------------


def _attention(method: SummaryMixingImage | None, side: int) -> nn.Module:
    """One attention of width 32 on a square grid, without memory for its weights."""
    model = presets.build("toy:pixart", device="meta")
    if method is not None:
        pared.convert(model, method)
    attn = anatomy.of(model).sites("self_attention")[0].module
    if method is not None:
        attn.processor.grid.height = attn.processor.grid.width = side
    return attn


def _macs(method: SummaryMixingImage | None, side: int) -> int:
    attn = _attention(method, side)
    with FlopCounterMode(display=False) as counter:
        attn(torch.empty(1, side * side, 32, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "method, widths",
    [
        # Squares of the width for each token: f and s, c's part of the token, values, output.
        (SummaryMixingImage(), 4 / 8 + 1 + 2),
        (SummaryMixingImage(heads=1), 4 + 1 + 2),
        (SummaryMixingImage(mode="lite"), 2 / 8 + 2),
        (SummaryMixingImage(mode="fast"), 2 + 1 + 2),
    ],
)
def test_cost_is_linear_in_tokens(method, widths):
    once = 0 if method.mode == "lite" else 32**2  # c's part of the mean
    for side in (16, 32):
        assert _macs(method, side) == side**2 * (widths * 32**2 + 25 * 32) + once
    assert _macs(None, 64) / _macs(None, 32) > 14


# Settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel": 4}, "no token in its middle"),
        ({"kernel": 0}, "kernel=0"),
        ({"heads": 0}, "heads=0"),
        ({"mode": "expdecay"}, "'full', 'lite' or 'fast'"),
        ({"mode": "fast", "heads": 4}, "mode=fast has no heads"),
        ({"mode": "fast", "hidden": 64}, "mode=fast has no hidden"),
        ({"mode": "lite", "local": 64}, "mode=lite has no local"),
        ({"mode": "lite", "summary": 64}, "mode=lite has no summary"),
    ],
)
def test_bad_settings_say_what_is_right(settings, words):
    with pytest.raises(InputError, match=words):
        SummaryMixingImage(**settings)


@pytest.mark.parametrize("settings", [{"heads": 7}, {"local": 12}])
def test_heads_must_divide_every_width(settings):
    model = presets.build("toy:pixart", device="cpu")
    with pytest.raises(InputError, match=r"doesn't divide .* in transformer_blocks\.0\.attn1"):
        pared.convert(model, SummaryMixingImage(**settings))
    assert not stack_of(model)


def test_widths_of_its_own():
    method = SummaryMixingImage(heads=2, hidden=24, local=8, summary=20, kernel=3)
    assert pared.parse(method.spec()) == method
    model = pared.convert(presets.build("toy:pixart", device="cpu"), method)
    mixer = model.transformer_blocks[0].attn1.processor.mixer
    assert mixer.f[0].weight.shape == (2, 16, 12) and mixer.s[2].weight.shape == (2, 12, 10)
    assert mixer.c.of_local.weight.shape == (32, 8) and mixer.c.of_summary.weight.shape == (32, 20)


def test_a_mask_is_refused():
    attn = _attention(SummaryMixingImage(), 2)
    tokens = torch.empty(1, 4, 32, device="meta")
    with pytest.raises(InputError, match="no attention mask"):
        attn(tokens, attention_mask=torch.zeros(1, 1, 4, device="meta"))


# Learning: one layer from a random, sharpened softmax teacher on smooth tokens --------------------


def _smooth(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens (batch, 64, 32) of an 8 x 8 grid, smooth in space as those of pictures are."""
    coarse = torch.randn(batch, 32, 4, 4, generator=generator)
    x = nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")
    x = x + 0.3 * torch.randn(batch, 32, 8, 8, generator=generator)
    return x.flatten(2).transpose(1, 2)


def _distilled_error(method: TokenMixer, steps: int) -> float:
    """Relative error on fresh tokens after `steps` of training one converted layer."""
    torch.manual_seed(0)
    model = presets.build("toy:pixart", device="cpu")
    student = model.transformer_blocks[0].attn1
    for layer in (student.to_q, student.to_k):
        layer.weight.data.mul_(3)  # sharp enough that attention isn't a plain mean
    teacher = copy.deepcopy(student)
    pared.convert(model, method)
    student.processor.grid.height = student.processor.grid.width = 8
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = _smooth(16, generator)
        with torch.no_grad():
            target = teacher(x)
        loss = (student(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = _smooth(128, generator)
    with torch.no_grad():
        target = teacher(x)
        return float((student(x) - target).square().mean() / target.square().mean())


@pytest.mark.slow
def test_it_learns_and_needs_its_neighbours():
    start, end = (_distilled_error(SummaryMixingImage(), steps) for steps in (0, 200))
    alone = _distilled_error(SummaryMixingImage(kernel=1), 200)
    assert end < 0.9 * start, (start, end, alone)
    assert end < alone, (start, end, alone)
    # It compares no tokens, and a teacher that does is matched better by a mixer that does too.
    assert _distilled_error(EDiT(), 200) < end
