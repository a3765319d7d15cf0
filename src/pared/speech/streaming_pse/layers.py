"""The layers of both sides: self-attention with limited hearing, cross-attention to the enrolment.

Whether frames come one by one or all at once is a matter of the `Hearing` that the attention is
given; the layers are the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pared.nn.attention import attend
from pared.nn.rotary import Rotary, rotary_of, rotate
from pared.speech.streaming_pse.method import StreamingPSE

# What an enrolment leaves behind; see `StreamingPSEModel.encode`.
Enrolment = dict[str, Tensor]


@dataclass
class Hearing:
    """What self-attention hears.

    Attributes:
        rotary: angles of the frames that ask.
        visible: which keys each of them hears, (frames, keys) or (batch, 1, 1, keys).
        keys: ring buffers of earlier keys, rotated, (layers, batch, heads, L_c, channels), written
            to in place; None where all frames are at hand.
        values: of the values.
        slot: where in the rings the newest frame goes, (1,).
    """

    rotary: Rotary
    visible: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    slot: Tensor | None = None

    def remember(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, once those of the newest frames are among them."""
        if self.keys is None:
            return key, value
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.slot, key)
        values.index_copy_(2, self.slot, value)
        return keys, values


def angles(frames: Tensor, channels: int) -> Rotary:
    """Rotary angles of frames by their numbers, (frames,).

    In float64: after an hour the numbers are so large that float32 would lose a hundredth of a
    radian.
    """
    # Apple's GPUs have no float64.
    there = frames.cpu() if frames.device.type == "mps" else frames
    cos, sin = rotary_of(there.double(), channels)
    return Rotary(cos.float().to(frames.device), sin.float().to(frames.device))


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, settings: StreamingPSE, config: Any) -> None:
        super().__init__()
        self.config, self.heads = config, settings.heads
        self.to_qkv = nn.Linear(settings.width, 3 * settings.width)
        self.to_out = nn.Linear(settings.width, settings.width)

    def forward(self, x: Tensor, hearing: Hearing, layer: int) -> Tensor:
        """(batch, frames, width) to the same shape."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotate(qkv[:2], hearing.rotary).unbind()
        key, value = hearing.remember(layer, key, qkv[2])
        return self.to_out(attend(self, query, key, value, hearing.visible))


class LengthKeeping(nn.Linear):
    """A linear layer whose outputs are at first as long as its inputs.

    So S starts as large as the mean of E, which the static baseline has, and is of use as early.
    """

    def reset_parameters(self) -> None:
        """Draw the weights."""
        super().reset_parameters()
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


class CrossAttention(nn.Module):
    """S_t = MHA(q = LN(h_t) W_q, K, V): what frame t finds of the user in the enrolment."""

    def __init__(self, settings: StreamingPSE, config: Any) -> None:
        super().__init__()
        self.config, self.heads = config, settings.heads
        self.norm = nn.LayerNorm(settings.width)
        self.to_q = nn.Linear(settings.width, settings.width)
        self.to_kv = LengthKeeping(settings.width, 2 * settings.width)
        self.to_out = LengthKeeping(settings.width, settings.width)

    def cached(self, encoded: Tensor) -> Tensor:
        """K and V of E (batch, T_e, width): (2, batch, heads, T_e, channels)."""
        return self.to_kv(encoded).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, h: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """S, shaped like h (batch, frames, width); `valid` (batch, T_e): what is no padding."""
        query = self.to_q(self.norm(h)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        visible = None if valid is None else valid[:, None, None]
        return self.to_out(attend(self, query, key, value, visible))


class Fusion(nn.Module):
    """How S joins h: `concat` h + W_f [h; S], `add` h + S, `film` h (1 + W_g S) + W_b S."""

    def __init__(self, settings: StreamingPSE) -> None:
        super().__init__()
        self.kind, width = settings.fusion, settings.width
        if self.kind == "concat":
            self.merge = nn.Linear(2 * width, width)
        if self.kind == "film":
            self.scale, self.shift = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """Both (batch, frames, width)."""
        if self.kind == "concat":
            return h + self.merge(torch.cat([h, s], dim=-1))
        if self.kind == "film":
            return h * (1 + self.scale(s)) + self.shift(s)
        return h + s


class FeedForward(nn.Sequential):
    """W_2 GELU(W_1 LN(x)), the residual branch of a layer."""

    def __init__(self, settings: StreamingPSE) -> None:
        width, hidden = settings.width, settings.expansion * settings.width
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )


class Layer(nn.Module):
    """Self-attention, then what the frame is told of the user, then the feed-forward.

    Args:
        settings: the model's.
        config: the model's, which knows how attention is computed.
        told: whether this layer is told of the user.
    """

    def __init__(self, settings: StreamingPSE, config: Any, told: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(settings.width)
        self.attention = SelfAttention(settings, config)
        crosses = told and settings.conditioning == "cross"
        self.cross = CrossAttention(settings, config) if crosses else None
        self.fusion = Fusion(settings) if told else None
        self.feed_forward = FeedForward(settings)

    def forward(
        self, h: Tensor, hearing: Hearing, layer: int, enrolment: Enrolment | None = None
    ) -> Tensor:
        """(batch, frames, width) to the same shape; `layer` is this one's number."""
        h = h + self.attention(self.norm(h), hearing, layer)
        if self.fusion is not None:
            h = self.fusion(h, self.speaker(h, layer, enrolment or {}))
        return h + self.feed_forward(h)

    def speaker(self, h: Tensor, layer: int, enrolment: Enrolment) -> Tensor:
        """S_t for every frame, (batch, frames, width)."""
        if self.cross is not None:
            key, value = enrolment["key"][layer], enrolment["value"][layer]
            return self.cross(h, key, value, enrolment.get("valid"))
        if "vector" in enrolment:
            return enrolment["vector"][:, None].expand_as(h)
        return torch.zeros_like(h)


class FrameLayer(nn.Module):
    """A layer in which no frame hears another one; called as `Layer` is."""

    def __init__(self, settings: StreamingPSE) -> None:
        super().__init__()
        self.feed_forward = FeedForward(settings)

    def forward(self, h: Tensor, hearing: Hearing, layer: int) -> Tensor:
        """(batch, frames, width) to the same shape."""
        return h + self.feed_forward(h)


class Embedding(nn.Sequential):
    """Features (batch, frames, F) to (batch, frames, width)."""

    def __init__(self, settings: StreamingPSE) -> None:
        super().__init__(nn.Linear(settings.bins, settings.width), nn.LayerNorm(settings.width))


class EnrolmentEncoder(nn.Module):
    """E, one encoded vector for each frame of the enrolment."""

    def __init__(self, settings: StreamingPSE, config: Any) -> None:
        super().__init__()
        self.heads = settings.heads
        self.embed = Embedding(settings)
        by_frame = settings.enrolment_encoder == "frames"
        self.layers = nn.ModuleList(
            FrameLayer(settings) if by_frame else Layer(settings, config, told=False)
            for _ in range(settings.enrolment_layers)
        )
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """E (batch, T_e, width) from features (batch, T_e, F); what isn't `valid` isn't heard."""
        h = self.embed(features)
        numbers = torch.arange(h.shape[1], device=h.device)
        hearing = Hearing(angles(numbers, h.shape[-1] // self.heads), valid[:, None, None])
        for number, layer in enumerate(self.layers):
            h = layer(h, hearing, number)
        return self.norm(h)
