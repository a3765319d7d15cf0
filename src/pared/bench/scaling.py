"""Where a conversion pays: the time of one full-size block against the number of tokens."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

import pared.method
from pared import anatomy
from pared.anatomy import presets
from pared.bench.timing import Timings, interleave
from pared.method import Conversion


@dataclass(frozen=True)
class Point:
    """Times of one block at one picture size.

    Attributes:
        pixels: side of the square picture.
        tokens: image tokens.
        timings: by arm, each with its ratio to the base.
    """

    pixels: int
    tokens: int
    timings: Timings


class _Caught(Exception):
    """Ends a call of a model as soon as the inputs of its block are known."""


class Block:
    """One block of a preset at full width, with random weights, ready to be called at any size."""

    def __init__(
        self,
        preset: str,
        methods: Sequence[Conversion],
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> None:
        self.scale = presets.get(preset).vae_scale
        self.model = presets.build(preset, device=device, dtype=dtype, layers=1)
        if methods:
            pared.method.convert(self.model, *methods)
        self.family = anatomy.of(self.model)

    def call_at(self, pixels: int) -> tuple[Callable[[], object], int]:
        """A call of the bare block with the inputs it gets at `pixels`, and its image tokens."""
        side = pixels // self.scale
        block = self.family.blocks[0]
        caught: list[tuple[tuple, dict]] = []

        def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
            caught.append((args, kwargs))
            raise _Caught  # computing on would take as long as what is to be timed

        hook = block.module.register_forward_pre_hook(catch, with_kwargs=True)
        example = self.family.example(height=side, width=side)
        with torch.no_grad(), suppress(_Caught):
            self.family.denoise(self.model, *example)
        hook.remove()
        args, kwargs = caught[0]
        grid = self.family.grid(block.sites[0])
        # A run of several sizes shares the grid object, which the bare block can't update itself.
        height, width, tokens = grid.height or side, grid.width or side, grid.tokens

        @torch.no_grad()
        def call() -> object:
            grid.height, grid.width = height, width
            return block.module(*args, **kwargs)

        return call, tokens


def measure(
    preset: str,
    arms: dict[str, Sequence[Conversion]],
    sizes: Sequence[int],
    rounds: int = 5,
    warmup: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> list[Point]:
    """Time one block of `preset` for every arm and size, arms interleaved within a size.

    Args:
        preset: e.g. "pixart-sigma".
        arms: conversions by name; the first is the base of the ratios, usually `[]`.
        sizes: sides of square pictures, in pixels.
        rounds: timed rounds per size.
        warmup: rounds before them that don't count.
        dtype: of weights and activations.
        device: of the block.
    """
    blocks = {name: Block(preset, methods, dtype, device) for name, methods in arms.items()}
    points = []
    for pixels in sizes:
        calls, tokens = {}, 0
        for name, block in blocks.items():
            calls[name], seen = block.call_at(pixels)
            tokens = max(tokens, seen)
        timings = interleave(calls, rounds=rounds, warmup=warmup, base=next(iter(arms)))
        points.append(Point(pixels, tokens, timings))
    return points


def exponent(tokens: Sequence[float], seconds: Sequence[float]) -> float:
    """The p of seconds = c tokens^p, by least squares on logarithms."""
    x, y = [math.log(t) for t in tokens], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def crossover(
    tokens: Sequence[float], base: Sequence[float], other: Sequence[float]
) -> float | None:
    """The number of tokens from which `other` is faster than `base` for good.

    Interpolated on logarithms between the two sizes around the last change of sign; None where
    `other` doesn't win at the largest size.
    """
    gain = [math.log(b / o) for b, o in zip(base, other, strict=True)]
    if gain[-1] <= 0:
        return None
    losing = [i for i, g in enumerate(gain) if g <= 0]
    if not losing:
        return float(tokens[0])
    i = losing[-1]
    share = -gain[i] / (gain[i + 1] - gain[i])
    return math.exp((1 - share) * math.log(tokens[i]) + share * math.log(tokens[i + 1]))
