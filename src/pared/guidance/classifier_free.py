"""Classifier-free guidance by a picture and a prompt, as in InstructPix2Pix (arXiv 2211.09800).

    f = f(0, 0) + s_I [f(c_I, 0) - f(0, 0)] + s_P [f(c_I, c_P) - f(c_I, 0)]

with the picture c_I and the prompt c_P (its equation 3). A pass whose share in the sum is nothing
need not run: s_I = 1 leaves two, s_I = s_P too, and s_I = s_P = 1 one. Guidance by a prompt alone
(Ho and Salimans 2022, arXiv 2207.12598) is s_I = 1.
"""

from collections.abc import Mapping

from torch import Tensor


def passes(image_scale: float, text_scale: float) -> tuple[str, ...]:
    """The passes that given scales need.

    Args:
        image_scale: s_I.
        text_scale: s_P.

    Returns:
        Of "none" (neither picture nor prompt), "image" (the picture alone) and "both", those whose
        share in the sum isn't zero, in this order.
    """
    shares = _shares(image_scale, text_scale)
    return tuple(name for name, share in shares.items() if share)


def compose(found: Mapping[str, Tensor], image_scale: float, text_scale: float) -> Tensor:
    """The guided prediction.

    Args:
        found: the prediction of each pass that `passes` names.
        image_scale: s_I.
        text_scale: s_P.
    """
    names = passes(image_scale, text_scale)
    if len(names) == 3:
        none, image, both = (found[name] for name in names)
        return none + image_scale * (image - none) + text_scale * (both - image)
    if len(names) == 1:
        return found[names[0]]
    # In the form of stock pipelines, with their rounding: shares sum to one.
    first, second = (found[name] for name in names)
    return first + _shares(image_scale, text_scale)[names[1]] * (second - first)


def _shares(image_scale: float, text_scale: float) -> dict[str, float]:
    return {"none": 1 - image_scale, "image": image_scale - text_scale, "both": text_scale}
