"""The emoji world: 3,783 captioned pictures, in the package and offline.

    >>> from pared.worlds import emoji
    >>> world = emoji.load(split="train", size=64)
    >>> world.images.shape, world.captions[0]
    (torch.Size([3591, 3, 64, 64]), 'grinning face')

Whole combinations are held out (a base in its dark skin tone, a base as a woman): every held-out
base, skin tone and gender also occurs in the training rows, but never together there. So a model
that draws the held-out rows well has understood the parts, not memorised the picture.
"""

from pared.worlds.emoji.pairs import Pair, pairs
from pared.worlds.emoji.world import FILE, SPLITS, Emoji, load

__all__ = ["FILE", "SPLITS", "Emoji", "Pair", "load", "pairs"]
