"""What the measures of this folder ask of the tensors they are given."""

import torch

from pared.errors import InputError

# Rounding in half precision puts a clamped image at most this far outside [0, 1].
RANGE_SLACK = 1e-3


def as_double(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in float64, on its own device (on the CPU where Metal has no float64)."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.to(torch.float64)


def features(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Checks one set of features.

    Args:
        tensor: Features (samples, dimensions).
        name: What to call them in a message.

    Returns:
        The features in float64 (samples, dimensions).
    """
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}; features are (samples, dimensions), "
            "with at least one of each."
        )
    tensor = as_double(tensor)
    if not tensor.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity; features must be finite numbers.")
    return tensor


def same_width(*sets: torch.Tensor) -> None:
    """Refuses sets of features (samples, dimensions) that come from different spaces."""
    widths = [each.shape[1] for each in sets]
    if len(set(widths)) > 1:
        raise InputError(
            f"the sets have {' and '.join(map(str, widths))} dimensions; "
            "features are comparable only when the same encoder made them."
        )


def pairs(x: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks that two tensors (batch, ...) pair up sample by sample; returns both in float64."""
    if x.shape != reference.shape or x.ndim < 2 or 0 in x.shape:
        raise InputError(
            f"the shapes are {tuple(x.shape)} and {tuple(reference.shape)}; "
            "a paired measure needs the same shape (batch, ...) twice, and nothing empty."
        )
    return as_double(x), as_double(reference)


def images(tensor: torch.Tensor) -> torch.Tensor:
    """Checks images (batch, channels, height, width) in [0, 1]; returns them in float64."""
    if tensor.ndim != 4 or 0 in tensor.shape:
        raise InputError(
            f"the images have shape {tuple(tensor.shape)}; "
            "they must be (batch, channels, height, width), and nothing empty."
        )
    if not tensor.is_floating_point():
        raise InputError(
            f"the images are {tensor.dtype}; they must be floating point in [0, 1] "
            "(divide bytes by 255)."
        )
    tensor = as_double(tensor)
    low, high = tensor.aminmax()
    # Written so that NaN fails too.
    if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
        raise InputError(
            f"the images run from {low:.3g} to {high:.3g}; they must lie in [0, 1] "
            "(from [-1, 1], take x / 2 + 0.5)."
        )
    return tensor


def image_pairs(
    x: torch.Tensor, reference: torch.Tensor, smallest: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks two batches of images that pair up, each side at least `smallest` pixels long.

    Args:
        x: Images (batch, channels, height, width) in [0, 1].
        reference: Images of the same shape and range.
        smallest: The least height and width in pixels.

    Returns:
        Both in float64.
    """
    x, reference = pairs(images(x), images(reference))
    height, width = x.shape[-2:]
    if min(height, width) < smallest:
        raise InputError(
            f"the images are {height}x{width} pixels; this measure needs at least "
            f"{smallest}x{smallest}."
        )
    return x, reference
