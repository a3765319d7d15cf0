"""Input layers that read more channels than they were trained on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.errors import InputError


class WideConv2d(nn.Conv2d):
    """A convolution that takes missing last channels of its input for zeros."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight[:, : input.shape[1]], self.bias)


class WideLinear(nn.Linear):
    """A linear map that takes missing last channels of its input for zeros."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight[:, : input.shape[-1]], self.bias)


@torch.no_grad()
def widened(layer: nn.Module) -> nn.Module:
    """A layer that reads twice the channels, the new ones last and without weight at first.

    Args:
        layer: a plain convolution or linear map.

    Raises:
        InputError: it's another kind of layer.
    """
    wide: nn.Conv2d | nn.Linear
    if type(layer) is nn.Conv2d and layer.groups == 1:
        conv: Any = layer
        wide = WideConv2d(
            2 * conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=conv.bias is not None,
        )
    elif type(layer) is nn.Linear:
        bias = layer.bias is not None
        wide = WideLinear(2 * layer.in_features, layer.out_features, bias=bias)
    else:
        raise InputError(
            f"an input layer of type {type(layer).__name__} can't read more channels; it must be a "
            "plain Conv2d or Linear."
        )
    wide = wide.to(layer.weight.device, layer.weight.dtype)
    wide.weight.zero_()
    wide.weight[:, : layer.weight.shape[1]] = layer.weight
    if layer.bias is not None and wide.bias is not None:
        wide.bias.copy_(layer.bias)
    return wide
