"""Coarse to fine: sizes, what is refused, and that refining keeps what was painted."""

import numpy as np
import pytest
import torch

import pared
from pared.errors import InputError
from pared.upscaling import coarse_to_fine
from tests.recipes.pipelines import pipeline


@pytest.mark.parametrize("family", ["unet", "sd3", "flux"])
def test_sizes_multiply(family):
    pipe = pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    images = coarse_to_fine(
        pipe,
        ["red heart", "cat face"],
        scales=(1.5, 2),
        num_inference_steps=2,
        height=64,
        width=96,
        generator=torch.Generator().manual_seed(0),
    )
    assert [image.size for image in images] == [(192, 128)] * 2


def test_a_converted_model_refines_too():
    pipe = pared.convert(pipeline("unet"), pared.LinFusion())
    pipe.set_progress_bar_config(disable=True)
    images = coarse_to_fine(pipe, "cat face", num_inference_steps=2, height=64, width=64)
    assert images[0].size == (128, 128)


@pytest.mark.parametrize("family", ["unet", "sd3", "flux"])
def test_what_is_placed_by_the_number_of_steps_fits_the_refining_too(family):
    """HURRY reuses in the last half of each run: of 10 steps, and of the 7 that are refined."""
    pipe = pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    with pared.apply(pipe, pared.parse("attention-map-reuse:reuse=hurry")) as handle:
        coarse_to_fine(pipe, "cat", (1.5,), num_inference_steps=10, height=64, width=64)
    stats = handle.stats["attention-map-reuse"]
    assert (stats["runs"], stats["calls"]) == (2, 17)
    assert stats["reused"] == stats["sites"] * (5 + 3)


def test_little_noise_keeps_the_picture():
    pipe = pipeline("sd3")
    pipe.set_progress_bar_config(disable=True)

    def paint(**more):
        noise = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 20, "height": 64, "width": 64, "generator": noise}
        return coarse_to_fine(pipe, "cat face", **call, **more)[0]

    noise = torch.Generator().manual_seed(0)
    small = pipe("cat face", num_inference_steps=20, height=64, width=64, generator=noise).images[0]
    wanted = np.asarray(small.resize((128, 128)), dtype=float)
    errors = [
        np.abs(np.asarray(paint(strength=s), dtype=float) - wanted).mean() for s in (0.05, 1.0)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    "given, part",
    [
        ({"scales": ()}, "don't ascend"),
        ({"scales": (2, 2)}, "don't ascend"),
        ({"scales": (0.5,)}, "don't ascend"),
        ({"strength": 0}, "strength 0 can't be"),
        ({"strength": 1.5}, "strength 1.5 can't be"),
        ({"num_inference_steps": 1}, "1 steps at strength 0.7 leave none to refine"),
    ],
)
def test_refusals(given, part):
    with pytest.raises(InputError, match=part):
        coarse_to_fine(pipeline("unet"), "x", **given)


def test_a_pipeline_without_image_to_image_is_refused():
    with pytest.raises(InputError, match="no image-to-image form of PixArtSigmaPipeline"):
        coarse_to_fine(pipeline("pixart"), "x")
