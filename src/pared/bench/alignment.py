"""How well images and texts agree, from the features of an encoder of both.

Features are (samples, dimensions), images and texts in one space. All scores are cosines, so the
length of a feature never counts.
"""

from collections.abc import Sequence

import torch

from pared.bench.checks import features, same_width
from pared.errors import InputError

# Cosines of float32 features carry no more digits than this: closer ones are ties, and a change
# of a unit feature by less is none.
RESOLUTION = 1e-6


def retrieval(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    target: torch.Tensor,
    k: Sequence[int] = (1, 5),
) -> dict[int, float]:
    """Top-k accuracy of finding each image's text among all texts.

    Ties count as their expected value under random order: with g texts strictly closer to the
    image than its own and t equally close (its own among them), the image scores
    min(1, max(0, (k - g) / t)). So an encoder that maps everything to one point scores k / texts,
    plain chance. A text listed twice is its own rival by this rule: list each different text once,
    and let several images share a target.

    Args:
        image_features: Features (images, dimensions).
        text_features: Features (texts, dimensions), one row for each different text.
        target: Row of each image's text (images,), integers.
        k: How many of the closest texts to look among; each at most the number of texts.

    Returns:
        For each k the accuracy in [0, 1].
    """
    images, texts = _unit(image_features, "image_features"), _unit(text_features, "text_features")
    same_width(images, texts)
    target = target.to(images.device)
    if target.shape != images.shape[:1] or target.is_floating_point():
        raise InputError(
            f"target is {target.dtype} of shape {tuple(target.shape)}; it must hold one integer "
            f"for each of the {len(images)} images."
        )
    if target.min() < 0 or target.max() >= len(texts):
        raise InputError(
            f"target runs from {target.min()} to {target.max()}; it must name rows of the "
            f"{len(texts)} texts, 0 to {len(texts) - 1}."
        )
    for each in k:
        if not 1 <= each <= len(texts):
            raise InputError(f"k is {each}; among {len(texts)} texts it must be 1 to {len(texts)}.")

    cosines = images @ texts.mT
    lead = cosines - cosines.gather(1, target[:, None].long())
    closer = (lead > RESOLUTION).sum(dim=1).double()
    tied = (lead.abs() <= RESOLUTION).sum(dim=1).double()
    return {each: ((each - closer) / tied).clamp(0, 1).mean().item() for each in k}


def clip_score(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """CLIPScore of each image with its text, 100 max(cos, 0), the scale of torchmetrics.

    The paper's own scale, 2.5 max(cos, 0), is a fortieth of it.

    Args:
        image_features: Features (batch, dimensions).
        text_features: Features of the text of each (batch, dimensions).

    Returns:
        Scores (batch,) in [0, 100], float64.
    """
    images, texts = _unit(image_features, "image_features"), _unit(text_features, "text_features")
    _same_shape(images, texts)
    return 100 * (images * texts).sum(dim=1).clamp(min=0)


def directional_similarity(
    source_image: torch.Tensor,
    edited_image: torch.Tensor,
    source_text: torch.Tensor,
    edited_text: torch.Tensor,
) -> torch.Tensor:
    """Whether an edit moved the image the way the text moved: the cosine of the two changes.

    Changes are taken between unit features, as in InstructPix2Pix.

    Args:
        source_image: Features of the images before (batch, dimensions).
        edited_image: Features of the images after (batch, dimensions).
        source_text: Features of the texts before (batch, dimensions).
        edited_text: Features of the texts after (batch, dimensions).

    Returns:
        Cosine (batch,) in [-1, 1], float64; NaN where image or text did not change, which is no
        direction. Count these and report them: they are failed edits, not missing data.
    """
    before, after = _unit(source_image, "source_image"), _unit(edited_image, "edited_image")
    text_before, text_after = _unit(source_text, "source_text"), _unit(edited_text, "edited_text")
    _same_shape(before, after, text_before, text_after)
    return (_direction(after - before) * _direction(text_after - text_before)).sum(dim=1)


def _unit(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Checked features (samples, dimensions) at length 1."""
    tensor = features(tensor, name)
    lengths = tensor.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        raise InputError(f"{name} holds a row of zeros, which has no cosine with anything.")
    return tensor / lengths


def _direction(change: torch.Tensor) -> torch.Tensor:
    """Changes of unit features (samples, dimensions) at length 1, NaN where there was none."""
    lengths = change.norm(dim=1, keepdim=True)
    return change / lengths.where(lengths > RESOLUTION, torch.nan)


def _same_shape(*sets: torch.Tensor) -> None:
    shapes = {tuple(each.shape) for each in sets}
    if len(shapes) > 1:
        raise InputError(
            f"the features have shapes {', '.join(map(str, sorted(shapes)))}; row i of each must "
            "belong to sample i, so the shapes must be the same."
        )
