"""Edits of pictures that can be computed exactly: recolouring, and those that move everything.

Pictures are uint8, (count, 3, height, width), and stand on white.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# What a fully saturated, bright pixel becomes; red, green, blue in [0, 1]. None keeps the luma.
COLOURS: dict[str, tuple[float, float, float] | None] = {
    "red": (0.93, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.87, 0.10),
    "green": (0.15, 0.78, 0.20),
    "blue": (0.12, 0.45, 0.98),
    "purple": (0.62, 0.22, 0.88),
    "pink": (1.00, 0.45, 0.72),
    "grey": None,
}
# Colours that captions name, those above aside.
OTHER_COLOURS = ("black", "brown", "white")

# Instructions for edits that move every pixel or all of its colour, and what the picture is then.
FAR: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "mirror": ("mirror it", "mirrored", lambda images: images.flip(-1)),
    "turn": ("turn it upside down", "upside-down", lambda images: images.flip(-2)),
    "invert": ("invert the colours", "negative of", lambda images: 255 - images),
}

WHITE = 250


def recolour(images: Tensor, colour: str) -> Tensor:
    """Pictures in shades of one colour; white, black and grey stay as they are.

    A pixel is m + (M - m) h, with least channel m, greatest channel M and a pure hue h. The hue is
    replaced, and darkened by half of what h lacks in luma, so that red hearts still stand out on a
    yellow face. This is linear in mixing with white: soft edges stay soft, without a fringe.

    Args:
        images: uint8, (count, 3, height, width).
        colour: one of `COLOURS`.
    """
    import torch

    x = images / 255
    luma = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    tint = COLOURS[colour]
    if tint is None:
        return _bytes(luma.expand_as(x))
    least, greatest = x.aminmax(dim=1, keepdim=True)
    chroma = ((greatest - least) + (luma - least)) / 2
    return _bytes(least + chroma * torch.tensor(tint)[:, None, None])


def coloured_caption(caption: str, colour: str) -> str:
    """The caption of a recoloured picture: "red heart" in green is "green heart"."""
    known = {*COLOURS, *OTHER_COLOURS}
    return " ".join([colour, *(word for word in caption.split() if word not in known)])


def cut_out(images: Tensor) -> Tensor:
    """Opacity of pictures on white: 0 on the white around them, 1 on all else, (n, 1, h, w).

    White that the border isn't connected to is part of the picture: eyes, teeth, a ghost.
    """
    import torch

    white = images.amin(dim=1, keepdim=True) >= WHITE
    around = white.clone()
    around[..., 1:-1, 1:-1] = False
    growing = torch.arange(len(images))
    while len(growing):
        before, allowed = around[growing], white[growing]
        spread = before
        for axis in (-1, -2):
            # Both ways along lines of white.
            spread = _swept(spread, allowed, axis)
            spread = _swept(spread.flip(axis), allowed.flip(axis), axis).flip(axis)
        around[growing] = spread
        growing = growing[(spread != before).flatten(1).any(1)]
    return (~around).float()


def _swept(reached: Tensor, white: Tensor, axis: int) -> Tensor:
    """What is white from a reached pixel on, along one axis in its direction."""
    import torch

    place = torch.arange(1, white.shape[axis] + 1, dtype=torch.int16)
    place = place.view(-1, *[1] * (-1 - axis))
    last_reached = torch.cummax(place * reached, dim=axis).values
    last_barrier = torch.cummax(place * ~white, dim=axis).values
    return white & (last_reached > last_barrier)


def paste(background: Tensor, picture: Tensor, opacity: Tensor, top: int, left: int) -> Tensor:
    """One picture put on another.

    Args:
        background: uint8, (3, height, width).
        picture: of the size that it takes, times its opacity, (3, side, side) in [0, 1].
        opacity: (1, side, side).
        top: first row that is covered.
        left: first column that is covered.
    """
    side = picture.shape[-1]
    pasted = background.clone()
    under = background[:, top : top + side, left : left + side] / 255
    pasted[:, top : top + side, left : left + side] = _bytes(picture + (1 - opacity) * under)
    return pasted


def _bytes(x: Tensor) -> Tensor:
    return (255 * x).round().clamp(0, 255).byte()
