"""Check 5 of the card evaluation-metrics, and the paired measures beside it."""

import itertools
import math

import pytest
import torch
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from pared.bench.fidelity import cosine, crop_border, luma, psnr, relative_mse, sharpness, ssim
from pared.errors import InputError


@pytest.fixture
def pair():
    """Three smooth colour images (3, 3, 24, 32) and noisy copies."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 6, 8, generator=generator, dtype=torch.float64)
    reference = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    noise = 0.1 * torch.randn(reference.shape, generator=generator, dtype=torch.float64)
    return (reference + noise).clamp(0, 1), reference


def blur(images, times=1):
    for _ in range(times):
        images = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return images


@pytest.mark.parametrize("error", [0.5, 0.1, 0.001])
def test_psnr_of_a_uniform_error(error):
    reference = torch.full((2, 3, 4, 4), 0.2, dtype=torch.float64)
    expected = torch.full((2,), -20 * math.log10(error), dtype=torch.float64)
    torch.testing.assert_close(psnr(reference + error, reference), expected)


def test_equal_images(pair):
    _, reference = pair
    one = torch.ones(3, dtype=torch.float64)
    assert (psnr(reference, reference) == torch.inf).all()
    torch.testing.assert_close(ssim(reference, reference), one)
    torch.testing.assert_close(cosine(reference, reference), one)
    torch.testing.assert_close(sharpness(reference, reference), one)
    torch.testing.assert_close(relative_mse(reference, reference), one - 1)


def test_psnr_matches_torchmetrics(pair):
    theirs = peak_signal_noise_ratio(*pair, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(*pair), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(11, 11), (11, 30), (24, 32)])
def test_ssim_matches_torchmetrics(pair, size):
    x, reference = (each[..., : size[0], : size[1]] for each in pair)
    theirs = structural_similarity_index_measure(x, reference, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(x, reference), theirs.flatten(), rtol=0, atol=1e-5)


def test_each_image_is_measured_alone(pair):
    x, reference = pair
    for measure in (psnr, ssim, cosine, relative_mse, sharpness):
        alone = torch.cat([measure(x[i : i + 1], reference[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(measure(x, reference), alone)


def test_half_precision_is_measured_in_double(pair):
    x, reference = (each.half() for each in pair)
    assert torch.equal(psnr(x, reference), psnr(x.double(), reference.double()))


def test_luma_is_the_weighted_sum():
    colours = torch.eye(3)[:, :, None, None]
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    torch.testing.assert_close(luma(colours).flatten(), weights)
    white = torch.ones(1, 3, 2, 2)
    torch.testing.assert_close(luma(white), torch.ones(1, 1, 2, 2, dtype=torch.float64))


def test_luma_weighs_an_error_in_green_most():
    reference = torch.full((3, 3, 4, 4), 0.5, dtype=torch.float64)
    x = reference + 0.1 * torch.eye(3, dtype=torch.float64)[:, :, None, None]
    expected = [-20 * math.log10(0.1 * weight) for weight in (0.299, 0.587, 0.114)]
    assert psnr(luma(x), luma(reference)).tolist() == pytest.approx(expected)
    assert psnr(x, reference).std() < 1e-9


def test_crop_border_forgets_errors_at_the_border():
    reference = torch.full((1, 3, 8, 10), 0.5)
    x = reference.clone()
    x[..., :2, :] = 0
    assert psnr(x, reference).isfinite()
    assert crop_border(x, 2).shape == (1, 3, 4, 6)
    assert psnr(crop_border(x, 2), crop_border(reference, 2)) == torch.inf
    assert torch.equal(crop_border(x, 0), x)


def test_sharpness_notices_blur_that_psnr_forgives(pair):
    _, reference = pair
    levels = [sharpness(blur(reference, times), reference) for times in range(5)]
    for sharper, softer in itertools.pairwise(levels):
        assert (softer < sharper).all()
    noisy, _ = pair
    assert (sharpness(noisy, reference) > 1).all()
    # Blurring the noise away raises PSNR, and sharpness tells at what price.
    assert (psnr(blur(noisy), reference) > psnr(noisy, reference)).all()
    assert (sharpness(blur(noisy), reference) < sharpness(noisy, reference)).all()


def test_sharpness_of_a_checkerboard_scales_with_contrast_squared():
    board = (torch.arange(6)[:, None] + torch.arange(6)) % 2 * torch.ones(1, 1, 6, 6)
    faint = board / 2 + 0.25
    assert sharpness(faint, board).item() == pytest.approx(0.25)


def test_cosine_ignores_scale_and_relative_mse_does_not():
    reference = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(cosine(3 * reference, reference), torch.ones(4).double())
    torch.testing.assert_close(cosine(-reference, reference), -torch.ones(4).double())
    torch.testing.assert_close(
        relative_mse(3 * reference, reference), torch.full((4,), 4.0).double()
    )
    torch.testing.assert_close(relative_mse(0 * reference, reference), torch.ones(4).double())


def test_without_a_direction_cosine_is_not_a_number():
    assert cosine(torch.zeros(1, 3), torch.ones(1, 3)).isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ssim(torch.rand(1, 3, 10, 20), torch.rand(1, 3, 10, 20)), "at least 11x11"),
        (lambda: sharpness(torch.rand(1, 3, 2, 9), torch.rand(1, 3, 2, 9)), "at least 3x3"),
        (lambda: psnr(torch.rand(1, 3, 4, 4), torch.rand(2, 3, 4, 4)), "same shape"),
        (lambda: psnr(torch.rand(3, 4, 4), torch.rand(3, 4, 4)), "batch, channels"),
        (lambda: psnr(torch.rand(1, 3, 4, 4) - 1, torch.rand(1, 3, 4, 4)), r"lie in \[0, 1\]"),
        (lambda: psnr(torch.full((1, 3, 4, 4), torch.nan), torch.rand(1, 3, 4, 4)), "nan"),
        (lambda: psnr(torch.ones(1, 3, 4, 4).byte(), torch.ones(1, 3, 4, 4)), "divide bytes"),
        (lambda: luma(torch.rand(1, 1, 4, 4)), "1 channels"),
        (lambda: crop_border(torch.rand(1, 1, 4, 4), 2), "border of 2 pixels"),
        (lambda: crop_border(torch.rand(1, 1, 4, 4), -1), "border of -1 pixels"),
        (lambda: cosine(torch.rand(3), torch.rand(3)), "same shape"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
