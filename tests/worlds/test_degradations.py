"""Real-ESRGAN's degradations: kernels, noise, chances, and what comes out of them all."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from pared.errors import InputError
from pared.worlds.degradations import (
    KERNELS,
    MILD,
    SIZES,
    Degradation,
    Round,
    _blur,
    _filtered,
    _noise,
    _sinc,
    degrade,
    enlarge,
)
from pared.worlds.draws import Draw

OFF = Round(
    blur=0.0, resize=(0, 0, 1), noise=(0.0, 0.0), gaussian=1.0, jpeg=(100, 100)
)  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(seed=0):
    return Draw(seeded(seed))


def only(kind):
    """Settings that always choose one kind of kernel."""
    return tuple(float(each == kind) for each in KERNELS)


def painted(cells):
    """Four pictures (4, 3, 32, 32), the smoother the fewer their cells."""
    coarse = torch.rand(4, 3, cells, cells, generator=seeded())
    return (255 * torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")).byte()


@pytest.fixture(scope="module")
def pictures():
    return painted(3)


def error(x, y):
    return (x.float() - y.float()).square().mean(dim=(1, 2, 3)).sqrt()


# Kernels


@pytest.mark.parametrize("kind", KERNELS)
def test_blurs_are_normalised_and_positive(kind):
    for seed in range(10):
        kernel = _blur(Round(kernels=only(kind)), draw(seed))
        assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] in SIZES
        assert kernel.sum().item() == pytest.approx(1, abs=1e-5) and (kernel >= 0).all()
        torch.testing.assert_close(kernel, kernel.flip(0, 1))
        if kind[0]:
            torch.testing.assert_close(kernel, kernel.T, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(kernel, kernel.flip(0), rtol=1e-4, atol=1e-6)


def test_a_generalised_gaussian_of_exponent_one_is_a_gaussian():
    plain = Round(kernels=only((False, "gaussian")))
    general = Round(kernels=only((False, "generalised")), beta_generalised=(1.0, 1.0))
    torch.testing.assert_close(_blur(plain, draw()), _blur(general, draw()))


def test_width_of_an_anisotropic_blur_is_sigma():
    settings = Round(kernels=only((False, "gaussian")), sigma=(1.0, 2.0))
    for seed in range(20):
        kernel = _blur(settings, draw(seed))
        if len(kernel) < 17:  # cut off
            continue
        line = torch.arange(len(kernel)) - float(len(kernel) // 2)
        across, down = torch.meshgrid(line, line, indexing="ij")
        offsets = torch.stack([across.flatten(), down.flatten()])
        moments = (offsets * kernel.flatten()) @ offsets.T
        widths = torch.linalg.eigvalsh(moments).sqrt()
        assert 0.95 < widths[0] <= widths[1] < 2.05
        # The same draws in the same order: sizes and angles aside, the sigmas.
        replay = draw(seed)
        replay.of(settings.kernels)
        sigmas = sorted(replay.uniform(*settings.sigma) for _ in range(2))
        assert widths.tolist() == pytest.approx(sigmas, rel=0.03)


def test_plateaus_have_heavier_tails_than_gaussians():
    plateau = Round(kernels=only((True, "plateau")), beta_plateau=(1.0, 1.0), sigma=(1.0, 1.0))
    gaussian = Round(kernels=only((True, "gaussian")), sigma=(1.0, 1.0))
    assert _blur(plateau, draw())[0, 0] > 50 * _blur(gaussian, draw())[0, 0]


def test_sinc_passes_what_is_slow_stops_what_is_fast_and_rings():
    for seed in range(20):
        kernel = _sinc(draw(seed))
        cutoff = draw(seed).uniform(math.pi / 3, math.pi)
        if len(kernel) < 17:  # a short filter has no sharp edge
            continue
        response = torch.fft.fft2(kernel, s=(64, 64)).abs()[0, :33]
        frequency = torch.arange(33) * math.pi / 32
        assert (response[frequency < cutoff - 0.6] > 0.8).all()
        assert (response[frequency > cutoff + 0.6] < 0.2).all()
        assert kernel.min() < 0
    edge = torch.zeros(1, 3, 32, 32)
    edge[..., 16:] = 1
    assert _filtered(edge, _sinc(draw(3))).max() > 1.02


def test_filters_keep_flat_pictures_up_to_the_border():
    flat = torch.full((1, 3, 5, 7), 0.3)  # smaller than any kernel
    torch.testing.assert_close(_filtered(flat, _blur(Round(), draw())), flat)


# Noise


@pytest.mark.parametrize(("chance", "alike"), [(1.0, True), (0.0, False)])
@pytest.mark.parametrize("gaussian", [1.0, 0.0])
def test_grey_noise_is_the_same_in_all_channels(chance, alike, gaussian):
    settings = Round(gaussian=gaussian, grey=chance)
    noise = _noise(torch.full((1, 3, 8, 8), 0.5), settings, draw()).expand(1, 3, 8, 8)
    assert bool((noise == noise[:, :1]).all()) == alike


def test_gaussian_noise_is_as_strong_as_said():
    settings = Round(gaussian=1.0, noise=(10.0, 10.0), grey=0.0)
    noise = _noise(torch.full((1, 3, 100, 100), 0.5), settings, draw())
    assert noise.std().item() * 255 == pytest.approx(10, rel=0.02)
    assert noise.mean().abs() * 255 < 0.3


@pytest.mark.parametrize("light", [0.1, 0.8])
def test_poisson_noise_grows_with_the_root_of_light(light):
    settings = Round(gaussian=0.0, poisson=(2.0, 2.0), grey=0.0)
    noise = _noise(torch.full((1, 3, 100, 100), light), settings, draw())
    assert noise.std().item() == pytest.approx(2 * math.sqrt(light / 255), rel=0.02)


# Chances


def test_chances_are_the_papers():
    first, second = Degradation().first, Degradation().second
    assert first.kernels == second.kernels == (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    assert (first.sigma, second.sigma) == ((0.2, 3.0), (0.2, 1.5))
    assert (first.resize, second.resize) == ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))
    assert (first.factor, second.factor) == ((0.15, 1.5), (0.3, 1.2))
    assert (first.noise, second.noise) == ((1, 30), (1, 25))
    assert (first.poisson, second.poisson) == ((0.05, 3.0), (0.05, 2.5))
    assert first.jpeg == second.jpeg == (30, 95)
    assert (first.blur, second.blur, first.sinc) == (1.0, 0.8, 0.1)
    assert (first.grey, first.gaussian, Degradation().final_sinc) == (0.4, 0.5, 0.8)


def test_draws_follow_their_chances():
    drawn, weights = draw(), Round().kernels
    found = Counter(drawn.of(weights) for _ in range(4000))
    for kind, weight in enumerate(weights):
        assert found[kind] / 4000 == pytest.approx(weight, abs=0.03)
    assert sum(drawn.chance(0.3) for _ in range(4000)) / 4000 == pytest.approx(0.3, abs=0.03)
    values = [drawn.uniform(2, 5) for _ in range(1000)]
    assert 2 <= min(values) < 2.1 and 4.9 < max(values) <= 5
    assert {drawn.one(SIZES) for _ in range(200)} == set(SIZES)


# Whole degradations


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_pictures_come_out_smaller(pictures, scale):
    small = degrade(pictures, seeded(), scale)
    assert small.dtype == torch.uint8 and small.shape == (4, 3, 32 // scale, 32 // scale)


@pytest.mark.parametrize("settings", [Degradation(), MILD])
def test_the_generator_decides_everything(pictures, settings):
    torch.manual_seed(1)
    first = degrade(pictures, seeded(), settings=settings)
    torch.manual_seed(2)
    assert torch.equal(first, degrade(pictures, seeded(), settings=settings))
    assert not torch.equal(first, degrade(pictures, seeded(1), settings=settings))
    same = degrade(pictures[:1].repeat(4, 1, 1, 1), seeded(), settings=settings)
    assert len({each.numpy().tobytes() for each in same}) == 4, "each in its own way"


def test_with_everything_off_only_jpeg_is_left(pictures):
    same = degrade(pictures, seeded(), 1, Degradation(OFF, OFF, final_sinc=0.0))
    # Colour is stored at half the size, so that a little is lost even at quality 100.
    assert (error(same, pictures) < 4).all()


@pytest.mark.parametrize(
    "change",
    [
        {"blur": 1.0, "sigma": (2.0, 2.0), "sinc": 0.0},
        {"resize": (0, 1, 0), "factor": (0.2, 0.3)},
        {"noise": (20.0, 20.0)},
        {"jpeg": (5, 5)},
    ],
)
@pytest.mark.parametrize("which", ["first", "second"])
def test_every_part_of_either_round_harms(change, which):
    detailed, clean = painted(10), Degradation(OFF, OFF, final_sinc=0.0)
    harmed = replace(clean, **{which: replace(OFF, **change)})
    unharmed = degrade(detailed, seeded(), 1, clean)
    assert (error(degrade(detailed, seeded(), 1, harmed), unharmed) > 3).all()


def test_mild_degradation_is_milder(pictures):
    many = pictures.repeat(8, 1, 1, 1)
    mild, full = (
        error(enlarge(degrade(many, seeded(), settings=settings), (32, 32)), many).mean()
        for settings in (MILD, Degradation())
    )
    assert mild < 0.8 * full


def test_enlarging_a_flat_picture_keeps_it_flat():
    flat = torch.full((2, 3, 4, 4), 77, dtype=torch.uint8)
    assert (enlarge(flat, (16, 12)) == 77).all() and enlarge(flat, (16, 12)).shape[-2:] == (16, 12)


@pytest.mark.parametrize(
    ("images", "scale", "message"),
    [
        (torch.rand(1, 3, 8, 8), 4, "torch.float32 of shape"),
        (torch.zeros(1, 1, 8, 8).byte(), 4, "must be uint8"),
        (torch.zeros(1, 3, 8, 10).byte(), 4, "8 x 10 can't be made 4 times smaller"),
        (torch.zeros(1, 3, 8, 8).byte(), 0, "a scale of at least 1"),
    ],
)
def test_says_what_is_wrong(images, scale, message):
    with pytest.raises(InputError, match=message):
        degrade(images, seeded(), scale)
