"""How good edits, restorations and their like are, picture by picture.

Pictures are floating point (batch, 3, height, width) in [0, 1]. Each measure returns one figure per
picture (batch,). Averaging is the caller's, by `average` or with uncertainty by
`pared.bench.statistics`.

LPIPS isn't among them: its networks have to be fetched. Figures of the house judge take its place,
and are comparable with nothing but figures of the same judge.
"""

import itertools

import torch

from pared.bench import fidelity
from pared.bench.alignment import directional_similarity
from pared.bench.checks import image_pairs, images
from pared.bench.judge import Judge
from pared.errors import InputError


def caption_direction(
    judge: Judge, source: torch.Tensor, edited: torch.Tensor, captions: list[tuple[str, str]]
) -> torch.Tensor:
    """DCS: cos(E_I(edited) - E_I(source), E_T(caption after) - E_T(caption before)).

    The directional CLIP similarity of InstructPix2Pix (arXiv 2211.09800), by another encoder.

    Args:
        judge: encoder of pictures and texts.
        source: Pictures that were given (batch, 3, height, width) in [0, 1].
        edited: What was made of them.
        captions: What each picture shows before and should show after.

    Returns:
        Cosine (batch,) in [-1, 1]; NaN where nothing was changed.

    Raises:
        InputError: a picture's captions are the same, or there are more or fewer than pictures.
    """
    if len(captions) != len(source):
        raise InputError(
            f"{len(captions)} pairs of captions are given for {len(source)} pictures; each needs "
            "its own."
        )
    for number, (before, after) in enumerate(captions):
        if before == after:
            raise InputError(
                f"the captions of picture {number} are {before!r} both before and after, which is "
                "no direction; measure such pictures by `closeness`."
            )
    texts = [judge.of_texts([pair[side] for pair in captions]) for side in (0, 1)]
    return directional_similarity(judge.of_images(source), judge.of_images(edited), *texts)


def target_direction(
    judge: Judge, source: torch.Tensor, edited: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """DVS: cos(E_I(edited) - E_I(source), E_I(target) - E_I(source)).

    The directional visual similarity of Explicit Conditioning (arXiv 2503.17593), whose definition
    is chosen here: against the data set's own target.

    Args:
        judge: encoder of pictures.
        source: Pictures that were given (batch, 3, height, width) in [0, 1].
        edited: What was made of them.
        target: What should have been made of them.

    Returns:
        Cosine (batch,) in [-1, 1]; NaN where nothing was changed, or nothing was to be.
    """
    before, after, wanted = (judge.of_images(each) for each in (source, edited, target))
    return directional_similarity(before, after, before, wanted)


def closeness(x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Against exact targets: mean squared error, PSNR in decibels, SSIM.

    Args:
        x: Pictures (batch, 3, height, width) in [0, 1], at least 11 pixels on each side.
        target: What they should be, of the same shape.

    Returns:
        `mse`, `psnr` and `ssim`, each (batch,).
    """
    x, target = image_pairs(x, target)
    return {
        "mse": (x - target).square().mean(dim=(1, 2, 3)),
        "psnr": fidelity.psnr(x, target),
        "ssim": fidelity.ssim(x, target),
    }


def diversity(judge: Judge, samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far samples from different seeds are apart, averaged over all pairs of seeds.

    Args:
        judge: encoder of pictures.
        samples: Pictures (seeds, batch, 3, height, width) in [0, 1], two seeds at least.

    Returns:
        `features`, 1 - cosine of the judge's features, and `pixels`, the root of the mean squared
        difference; each (batch,), 0 where all seeds give the same.

    Raises:
        InputError: there is only one seed.
    """
    if samples.ndim != 5 or len(samples) < 2:
        raise InputError(
            f"the samples have shape {tuple(samples.shape)}; diversity needs (seeds, batch, 3, "
            "height, width) with two seeds at least."
        )
    samples = images(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])
    features = torch.stack([judge.of_images(each) for each in samples])
    pairs = list(itertools.combinations(range(len(samples)), 2))
    apart = [1 - (features[a] * features[b]).sum(-1) for a, b in pairs]
    pixels = [(samples[a] - samples[b]).square().mean(dim=(1, 2, 3)).sqrt() for a, b in pairs]
    return {
        # Features are of unit length only up to rounding.
        "features": torch.stack(apart).mean(0).clamp(min=0),
        "pixels": torch.stack(pixels).mean(0),
    }


def average(direction: torch.Tensor) -> tuple[float, float]:
    """The mean of directional figures (batch,), and the share of pictures that have none.

    A picture that wasn't changed counts as 0: a failed edit, not missing data.
    """
    missing = direction.isnan()
    return direction.nan_to_num(0.0).mean().item(), missing.double().mean().item()
