"""Guidance by picture and prompt: which passes it needs, and what they come to."""

import pytest
import torch

from pared.guidance.classifier_free import compose, passes

FOUND = {
    name: torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate(("none", "image", "both"))
}


@pytest.mark.parametrize(
    ("image_scale", "text_scale", "names"),
    [
        # The settings that Explicit Conditioning is compared with.
        (1.0, 1.0, ("both",)),
        (1.0, 7.5, ("image", "both")),
        (1.6, 7.5, ("none", "image", "both")),
        (2.0, 2.0, ("none", "both")),
        (1.6, 0.0, ("none", "image")),
        (1.0, 0.0, ("image",)),
        (0.0, 0.0, ("none",)),
    ],
)
def test_only_passes_with_a_share_are_needed(image_scale, text_scale, names):
    assert passes(image_scale, text_scale) == names
    none, image, both = FOUND.values()
    wanted = none + image_scale * (image - none) + text_scale * (both - image)
    needed = {name: FOUND[name] for name in names}
    # Left-out terms cancel but for rounding, which the scale of the prompt makes larger.
    torch.testing.assert_close(
        compose(needed, image_scale, text_scale), wanted, rtol=1e-5, atol=1e-5
    )


def test_one_pass_is_handed_on_as_it_is():
    assert compose({"both": FOUND["both"]}, 1.0, 1.0) is FOUND["both"]


def test_guidance_by_the_prompt_alone_is_that_of_stock_pipelines():
    uncond, text = FOUND["image"], FOUND["both"]
    found = compose({"image": uncond, "both": text}, 1.0, 7.5)
    assert torch.equal(found, uncond + 7.5 * (text - uncond))


def test_three_passes_are_those_of_instruct_pix2pix():
    """In the order of diffusers' pipeline, which names them text, image, uncond."""
    uncond, image, text = FOUND.values()
    wanted = uncond + 7.5 * (text - image) + 1.6 * (image - uncond)
    torch.testing.assert_close(compose(FOUND, 1.6, 7.5), wanted, rtol=1e-6, atol=1e-5)
