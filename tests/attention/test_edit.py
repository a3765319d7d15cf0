"""EDiT: its paper's checks; those that need no weights come with the package and run here too."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention import edit_checks
from pared.attention.edit import EDiT
from pared.attention.linfusion import LinFusion
from pared.attention.sana import Sana
from pared.errors import InputError
from pared.method import stack_of

CHECKS = [f for name, f in inspect.getmembers(edit_checks) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


def test_full_model_parameters():
    model = presets.build("pixart-sigma", device="meta")
    before = sum(p.numel() for p in model.parameters())
    pared.convert(model, EDiT())
    after = sum(p.numel() for p in model.parameters())
    assert before == 610_856_096
    assert after - before == 28 * 3_342_816 == 93_598_848


def _macs(method, side: int) -> int:
    """Counted MACs of one attention layer of width 128 on a square grid, projections included."""
    model = presets.build("toy:pixart", device="meta")
    if method is not None:
        pared.convert(model, method)
    family = anatomy.of(model)
    site = family.sites("self_attention")[0]
    if method is not None:
        site.module.processor.grid.height = site.module.processor.grid.width = side
    with FlopCounterMode(display=False) as counter:
        site.module(torch.empty(1, side * side, site.width, device="meta"))
    return counter.get_total_flops() // 2


def test_cost_grows_linearly_with_tokens():
    assert _macs(EDiT(), 128) / _macs(EDiT(), 64) == pytest.approx(4, rel=0.02)
    # The toy's width is small, so that 128 x 128 tokens are deep in the quadratic regime.
    assert _macs(None, 128) / _macs(None, 64) > 14


def test_crossover_of_pixart_sigma_lies_between_512_and_1024():
    def macs(pixels: int, convert: bool) -> int:
        model = presets.build("pixart-sigma", device="meta")
        if convert:
            pared.convert(model, EDiT())
        family = anatomy.of(model)
        with FlopCounterMode(display=False) as counter:
            family.denoise(model, *family.example(height=pixels // 8, width=pixels // 8))
        return counter.get_total_flops() // 2

    assert macs(512, True) > macs(512, False)
    assert macs(1024, True) < macs(1024, False)


def test_projections_come_from_the_teacher():
    torch.manual_seed(0)
    teacher = presets.build("toy:pixart", device="cpu")
    student = pared.convert(copy.deepcopy(teacher), EDiT())
    kept = student.state_dict()
    for name, value in teacher.state_dict().items():
        assert torch.equal(kept[name], value), name
    new = set(kept) - set(teacher.state_dict())
    assert new and all(".processor." in name for name in new)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (7, 5), (1, 9), (4, 12)])
def test_any_grid(height, width):
    model = pared.convert(presets.build("toy:pixart", device="cpu"), EDiT())
    family = anatomy.of(model)
    patch = family.config.patch_size
    example = family.example(height=height * patch, width=width * patch)
    assert family.denoise(model, *example).shape == example[0].shape


@pytest.mark.parametrize("name", ["toy:dit", "toy:sd3", "toy:unet", "toy:sdxl"])
def test_serves_image_self_attention_of_other_families(name):
    model = presets.build(name, device="cpu")
    family = anatomy.of(model)
    if name == "toy:dit":
        example = family.example()
    else:
        example = family.example(height=16, width=12 if "sd3" in name else 16)
    before = family.denoise(model, *example)
    pared.convert(model, EDiT())
    after = family.denoise(model, *example)
    assert after.shape == before.shape and after.isfinite().all()
    assert not torch.equal(before, after)


def test_flux_has_no_image_self_attention():
    with pytest.raises(InputError, match="finds no site"):
        pared.convert(presets.build("toy:flux", device="cpu"), EDiT())


def test_layers_and_conflicts():
    model = presets.build("toy:pixart", device="cpu")
    pared.convert(model, EDiT(layers=(0,)))
    pared.convert(model, Sana(layers=(1,)))
    assert [m.info.slug for m in stack_of(model)] == ["edit", "sana"]
    with pytest.raises(InputError, match=r"linfusion replaces transformer_blocks.0.attn1"):
        pared.convert(model, LinFusion(layers=(0,)))
    with pytest.raises(InputError, match="layers="):
        pared.convert(model, EDiT(layers=(9,)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"query": "sc"}, "'cf' or 'none'"),
        ({"key": "none"}, "different numbers of tokens"),
        ({"ratio": 4}, "no setting 'ratio'"),
    ],
)
def test_bad_settings_say_what_is_right(settings, words):
    with pytest.raises(InputError, match=words):
        EDiT(**settings)


def test_r_must_divide_the_width():
    with pytest.raises(InputError, match="doesn't divide the width"):
        pared.convert(presets.build("toy:pixart", device="cpu"), EDiT(r=7))


def test_a_mask_is_refused():
    model = pared.convert(presets.build("toy:pixart", device="cpu"), EDiT())
    family = anatomy.of(model)
    attn = family.sites("self_attention")[0].module
    with pytest.raises(InputError, match="no attention mask"):
        attn(torch.randn(1, 4, 64 if attn.to_q.in_features == 64 else attn.to_q.in_features),
             attention_mask=torch.zeros(1, 1, 4))  # fmt: skip


# Learning: a frozen random softmax teacher, one layer, students from its projections ------------


class _Layer(nn.Module):
    """One attention of a toy PixArt, apart from the model."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn


def _smooth(batch: int, side: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Spatially smooth random tokens, as images give: low-resolution noise, enlarged."""
    coarse = torch.randn(batch, width, side // 2, side // 2, generator=generator)
    fine = torch.randn(batch, width, side, side, generator=generator)
    x = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear") + 0.3 * fine
    return x.flatten(2).transpose(1, 2)


def _distilled_error(method, seed: int, steps: int = 300, side: int = 8) -> float:
    """Relative output error on fresh inputs after training one converted layer."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=8,
        num_layers=1,
        sample_size=side,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    teacher = copy.deepcopy(anatomy.of(model).sites("self_attention")[0].module)
    for layer in (teacher.to_q, teacher.to_k):
        layer.weight.data.mul_(3)  # sharp enough that attention isn't a plain mean
    model.transformer_blocks[0].attn1.load_state_dict(teacher.state_dict())
    pared.convert(model, method)
    student = model.transformer_blocks[0].attn1
    student.processor.grid.height = student.processor.grid.width = side
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(100 + seed)
    for _ in range(steps):
        x = _smooth(16, side, 32, generator)
        with torch.no_grad():
            target = teacher(x)
        loss = (student(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = _smooth(128, side, 32, torch.Generator().manual_seed(999))
    with torch.no_grad():
        target = teacher(x)
        return float((student(x) - target).square().mean() / target.square().mean())


@pytest.mark.slow
def test_learning_ranks_variants_as_the_ablation_does():
    variants = {
        "cf": EDiT(r=1, key="none", value="none"),
        "cf+sc": EDiT(r=1),
        "sc": EDiT(query="none"),
    }
    errors = {
        name: sum(_distilled_error(method, seed) for seed in range(3)) / 3
        for name, method in variants.items()
    }
    assert errors["cf+sc"] < errors["sc"], errors
    assert errors["cf"] <= errors["cf+sc"], errors


def test_half_of_the_ablation_grid_runs():
    for query in ("cf", "none"):
        for key, value in (("sc", "sc"), ("cf", "none"), ("none", "none"), ("cf", "cf")):
            model = pared.convert(
                presets.build("toy:pixart", device="cpu"), EDiT(query=query, key=key, value=value)
            )
            family = anatomy.of(model)
            assert family.denoise(model, *family.example()).isfinite().all()


def test_norm_order_switch_matters():
    outputs = []
    for first in (True, False):
        torch.manual_seed(0)
        model = pared.convert(presets.build("toy:pixart", device="cpu"), EDiT(cf_norm_first=first))
        for module in model.modules():
            if hasattr(module, "query_fusion"):
                nn.init.normal_(module.query_fusion.restore.weight, std=1 / math.sqrt(8))
        family = anatomy.of(model)
        example = family.example(generator=torch.Generator().manual_seed(1))
        outputs.append(family.denoise(model, *example))
    assert not torch.allclose(*outputs)
