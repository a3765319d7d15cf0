"""The loop of all tasks on models of many families, and what turns latents into pictures."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import pared
from pared.errors import InputError
from pared.guidance.explicit_conditioning import ExplicitConditioning
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
