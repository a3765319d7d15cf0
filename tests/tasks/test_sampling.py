"""The loop of all tasks on models of many families, and what turns latents into pictures."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler

import pared
from pared.errors import InputError
from pared.guidance.explicit_conditioning import ExplicitConditioning
from pared.method import denoiser
from pared.tasks.sampling import decode, sample, unit_of
from tests.recipes.pipelines import pipeline, vae


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def flux():
    """FLUX.1-dev's pipeline: its schedule follows the size."""
    pipe = pipeline("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_flux_paints_as_its_pipeline_does(flux):
    stock = flux(
        "a fox", height=64, width=96, num_inference_steps=3, generator=seeded(), output_type="pt"
    ).images
    call = {"steps": 3, "size": (64, 96), "generator": seeded()}
    found = sample(flux, "text-to-image", ["a fox"], **call)
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-5)


def test_flux_with_a_conditional_endpoint_edits(flux):
    pared.convert(flux, ExplicitConditioning())
    image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=seeded())
    found = sample(flux, "edit", ["make it green"], image, steps=2, generator=seeded())
    assert found.shape == image.shape and found.isfinite().all()
    with pytest.raises(InputError, match="multiples of 16"):
        sample(flux, "edit", ["make it green"], image[..., :56])


def test_the_unit_is_that_of_a_token():
    units = {"unet": 8, "pixart": 16, "sd3": 16, "flux": 16}
    assert {family: unit_of(pipeline(family)) for family in units} == units


def painted(pipe, task):
    """A picture of a task, its noise drawn on the CPU."""
    image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=seeded())
    given = image if task == "edit" else None
    return sample(pipe, task, ["a red fox"], given, steps=2, generator=seeded()).cpu()


def able(family, methods):
    pipe = pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    return pared.convert(pipe, *map(pared.parse, methods))


ABLE = [
    ("unet", (), "text-to-image"),
    ("sdxl", (), "text-to-image"),
    ("pixart", ("multi-task-upcycling:experts=2",), "edit"),
    ("sd3", ("explicit-conditioning",), "edit"),
]


@pytest.mark.parametrize(("family", "methods", "task"), ABLE)
def test_a_pipeline_whose_weights_come_one_by_one_paints_the_same(family, methods, task):
    """Between the calls they are on no device, so that whoever asks a model for its own fails."""
    pipe = able(family, methods)
    wanted = painted(pipe, task)
    for part in pipe.components.values():  # as `enable_sequential_cpu_offload` does for a GPU
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert denoiser(pipe).device.type == "meta"
    torch.testing.assert_close(painted(pipe, task), wanted, rtol=0, atol=1e-6)


def test_models_go_back_when_a_picture_is_done():
    pipe = able("unet", ())
    pipe.enable_model_cpu_offload(device="cpu")
    before = pipe._all_hooks
    painted(pipe, "text-to-image")
    assert pipe._all_hooks and pipe._all_hooks is not before, "taken off and put on anew"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize(("family", "methods", "task"), ABLE)
def test_a_pipeline_offloaded_from_a_gpu_paints_the_same(family, methods, task, offload):
    pipe = able(family, methods)
    wanted = painted(pipe, task)
    getattr(pipe, offload)(device="cuda")
    torch.testing.assert_close(painted(pipe, task), wanted, rtol=0, atol=2e-2)


def test_a_size_that_does_not_fit_is_refused(flux):
    with pytest.raises(InputError, match=r"100 x 96 pixels don't fit the model; .* of 16"):
        sample(flux, "text-to-image", ["a fox"], size=(100, 96))


@torch.no_grad()
def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32():
    """What it computes is beyond 65504 on the way, as SDXL's is."""
    net = vae(4).eval()
    net.decoder.conv_in.weight.mul_(2e5)
    net.half()
    latents = torch.randn(1, 4, 4, 4, generator=seeded()).half()
    assert decode(net, latents).isfinite().all()
    assert net.dtype == torch.float16, "it stays what it was"
    net.register_to_config(force_upcast=False)
    assert decode(net, latents).isnan().any()
