"""CLEAR: its paper's checks; those that need no weights come with the package and run here too."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention import clear_checks
from pared.attention.clear import (
    Clear,
    Pooling,
    attended_pairs,
    attention_flops,
    proportional_scale,
)
from pared.attention.joint import Heads
from pared.attention.patch_parallel import (
    patch_attention,
    patch_attention_distributed,
    patch_rows,
)
from pared.bench import contract
from pared.errors import InputError
from pared.nn.layout import merge_heads, split_heads
from pared.nn.local_attention import Disk, local_attention_reference
from pared.objectives.denoising import condition_of
from pared.objectives.distillation import Distillation
from pared.training.loop import freeze_all_but

CHECKS = [f for name, f in inspect.getmembers(clear_checks) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


def test_the_saving_at_8192():
    full, disk = (attended_pairs(r, 512, 512, text=512) for r in (1000, 8))
    assert 1 - attention_flops(disk, 3072) / attention_flops(full, 3072) > 0.995


def test_what_trains_in_flux():
    model = presets.build("flux.1-dev", device="meta")
    pared.convert(model, Clear())
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320
    freeze_all_but(model, Clear().trainable(anatomy.of(model)))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_793_648_640


def test_what_trains_follows_the_layers():
    model = presets.build("toy:flux", device="meta")
    method = Clear(layers=(1, 2), pool=2)
    pared.convert(model, method)
    freeze_all_but(model, method.trainable(anatomy.of(model)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    double, single = "transformer_blocks.1.attn.", "single_transformer_blocks.0.attn."
    layers = {"to_q", "to_k", "to_v", "to_out.0"}
    assert trained == (
        {f"{double}{layer}.{part}" for layer in layers for part in ("weight", "bias")}
        | {f"{single}{layer}.{p}" for layer in layers - {"to_out.0"} for p in ("weight", "bias")}
        | {f"{path}processor.seen.pool.weight" for path in (double, single)}
    )


@pytest.mark.parametrize("name", ["toy:pixart", "toy:sd3", "toy:unet"])
def test_image_attention_takes_the_images_part_of_the_mask(name):
    model = presets.build(name, device="cpu")
    pared.convert(model, Clear(r=2))
    site = anatomy.of(model).sites("self_attention")[0]
    attn, grid = site.module, site.module.processor.grid
    grid.height, grid.width = 9, 6
    x = torch.randn(2, 54, site.width, generator=torch.Generator().manual_seed(0))
    q, k, v = (split_heads(f(x), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
    if attn.norm_q is not None:
        q, k = attn.norm_q(q), attn.norm_k(k)
    wanted = attn.to_out[0](merge_heads(local_attention_reference(q, k, v, Disk(6, 2))))
    torch.testing.assert_close(attn(x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        contract.contract_saving,
        contract.contract_batch,
        contract.contract_gradients,
        contract.contract_bfloat16,
        contract.contract_compile,
    ],
    ids=lambda f: f.__name__,
)
def test_the_contract_where_disks_are_small(function):
    """The contract's grids of 4 x 4 tokens lie within a disk of the default radius."""
    function(Clear(r=2, pool=2), "sd3")


def test_pooling_needs_whole_cells():
    model = pared.convert(presets.build("toy:sd3", device="cpu"), Clear(pool=4))
    family = anatomy.of(model)
    assert family.denoise(model, *family.example(height=16, width=24)).isfinite().all()
    with pytest.raises(InputError, match=r"pool=4 doesn't divide the image's 8 x 7 tokens"):
        family.denoise(model, *family.example(height=16, width=14))


def test_proportional_scale():
    assert proportional_scale(4608, 128, pooled=False) == pytest.approx(128**-0.5)
    # log_4608(4608^2) = 2
    assert proportional_scale(4608**2, 2, pooled=False) == pytest.approx(1)
    assert proportional_scale(460, 8, pooled=True) == proportional_scale(4600, 8, pooled=False)


def test_proportional_scale_reaches_every_query():
    processor, image, text = clear_checks._layer(Clear(r=3, proportional=True), 5, 6, text=4)
    plain, _, _ = clear_checks._layer(Clear(r=3), 5, 6, text=4)
    share = proportional_scale(34, 8, pooled=False) / 8**-0.5
    scaled = (Heads(share * x.query, x.key, x.value) for x in (image, text))
    for got, wanted in zip(processor.mix(image, text, True), plain.mix(*scaled, True), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"r": 0}, "r=0"), ({"pool": -1}, "pool=-1"), ({"radius": 8}, "no setting 'radius'")],
)
def test_bad_settings_say_what_is_right(settings, words):
    with pytest.raises(InputError, match=words):
        Clear(**settings)


@pytest.mark.parametrize("name", ["toy:sd3", "toy:flux"])
def test_it_trains_under_autocast(name):
    model = pared.convert(presets.build(name, device="cpu"), Clear(r=2, pool=2))
    family = anatomy.of(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = family.denoise(model, *family.example(height=8, width=12, text_tokens=4))
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if ".pool." in n)


def test_a_pooling_keeps_its_type():
    pool = Pooling(2).to(torch.bfloat16)
    assert pool(torch.randn(1, 2, 24, 8).bfloat16(), 4, 6).dtype == torch.bfloat16


# Patches ----------------------------------------------------------------------------------------


def test_patches_are_as_equal_as_possible():
    assert patch_rows(14, 3, 4) == [range(4), range(4, 9), range(9, 14)]


def test_low_patches_are_refused():
    with pytest.raises(InputError, match=r"fewer than r=4 rows to a patch; use at most 3"):
        patch_rows(14, 4, 4)


def _tokens():
    generator = torch.Generator().manual_seed(0)
    return clear_checks._heads(11 * 6, generator), clear_checks._heads(5, generator)


def _one_patch(rank: int, folder: str) -> None:
    """What one of two processes does: its patch, into a file."""
    torch.set_num_threads(1)  # a forked process has no threads of its parent's pool
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    image, text = _tokens()
    rows = patch_rows(11, 2, 3)[rank]
    own = slice(rows.start * 6, rows.stop * 6)
    mine = Heads(*(x[:, :, own] for x in (image.query, image.key, image.value)))
    torch.save(patch_attention_distributed(mine, text, 11, 6, 3), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_compute_two_patches(tmp_path: Path):
    # Forked, since a fresh process spends seconds on importing torch.
    torch.multiprocessing.start_processes(
        _one_patch, (str(tmp_path),), nprocs=2, start_method="fork"
    )
    images, texts = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True)
    wanted_image, wanted_text = patch_attention(*_tokens(), 11, 6, 3, patches=2)
    torch.testing.assert_close(torch.cat(images, dim=-2), wanted_image, rtol=0, atol=1e-6)
    assert torch.equal(*texts)
    torch.testing.assert_close(texts[0], wanted_text, rtol=0, atol=1e-6)


# Learning: a frozen random FLUX, students that start as it with disks ---------------------------


def _flux() -> nn.Module:
    """FLUX with 2 two-stream and 4 one-stream blocks."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def _batch(generator: torch.Generator, size: int, side: int) -> dict[str, torch.Tensor]:
    """Smooth random latents of `side` x `side` tokens, and prompts."""
    coarse = torch.randn(size, 4, side // 2, side // 2, generator=generator)
    return {
        "latents": nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear"),
        "text": torch.randn(size, 8, 32, generator=generator),
        "pooled": torch.randn(size, 32, generator=generator),
    }


@torch.no_grad()
def _gap(student: nn.Module, teacher: nn.Module, side: int) -> float:
    """Mean squared distance to the teacher on held-out noise, over the teacher's variance."""
    generator = torch.Generator().manual_seed(999)
    batch = _batch(generator, 8, side)
    noised = Distillation().task.noised(batch, generator)
    outputs = [
        anatomy.of(m).denoise(m, noised.latents, noised.timestep, condition_of(batch))
        for m in (student, teacher)
    ]
    return float((outputs[0] - outputs[1]).square().mean() / outputs[1].var())


def _distilled_gap(teacher: nn.Module, side: int, **weights: float) -> float:
    """The gap after 300 steps of what the paper trains."""
    method = Clear(r=4)
    student = pared.convert(copy.deepcopy(teacher), method)
    freeze_all_but(student, method.trainable(anatomy.of(student)))
    objective = Distillation(**weights).bind(student, teacher)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(100)
    for _ in range(300):
        terms = objective(student, _batch(generator, 2, side), generator)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return _gap(student, teacher, side)


@pytest.mark.slow
def test_distillation_brings_the_teacher_back():
    teacher = _flux()
    at_32 = [_gap(pared.convert(_flux(), Clear(r=r)), teacher, side=32) for r in (2, 4, 8, 16)]
    assert at_32 == sorted(at_32, reverse=True) and at_32[-1] < 0.5 * at_32[0], at_32
    before = _gap(pared.convert(_flux(), Clear(r=4)), teacher, side=16)
    alone = _distilled_gap(teacher, side=16, truth=0)
    task = _distilled_gap(teacher, side=16, output=0, feature=0)
    both = _distilled_gap(teacher, side=16)
    # By the distillation terms alone: a random teacher knows nothing of the task, whose own term
    # leads any student away from it, only less far where the others hold it back.
    assert alone < 0.5 * before, (before, alone)
    assert both < task, (both, task)
