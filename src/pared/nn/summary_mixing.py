"""SummaryMixing: frames that hear one another through their mean, at a cost linear in time.

arXiv 2307.07421, Interspeech 2024; its streaming form arXiv 2409.07165.

    h_t = c([LN(v_t f(x_t)) ; LN(s_bar)]),    s_bar = sum_t v_t s(x_t) / sum_t v_t

f (local) and s (summary) are small networks, c merges what a frame says itself with the mean over
all frames; v is 1 where a frame is real and 0 where it is padding. The mixer knows neither
positions nor neighbours: it needs a branch of local mixing beside it.

Implemented from the papers; no code taken. Departures: c is kept as two maps, and that of the mean
runs once, not for every frame, which changes no result; where a visibility mask meets padding the
mean is over their intersection; `lite` obeys a visibility mask too. Chosen here: no dropout by
default; a block of a block-diagonal map starts like a linear layer of its own, uniform within
1 / sqrt(its inputs).
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.errors import InputError
from pared.nn.linear_attention import full_precision

Mode = Literal["full", "lite", "fast", "expdecay"]

DECAY = 0.995  # a of the weights a^|i - j| in mode "expdecay"


class Summary(NamedTuple):
    """A sum over frames and how many there were: all that a layer remembers of a stream.

    Attributes:
        total: sum of v_t s(x_t), (batch, 1, channels of s), float32 at least.
        frames: sum of v_t, (batch, 1, 1), in the same type.
    """

    total: Tensor
    frames: Tensor


class SummaryMixing(nn.Module):
    """The mixer in the place of a self-attention, (batch, time, width) in and out.

    Permuted frames give permuted results. Those of padded frames are not zero (normalisation gives
    them its bias): mask them before a convolution. Under `torch.compile` give a mask of ones rather
    than sometimes None, which compiles twice.

    Args:
        width: channels of the input.
        mode: "full"; "lite", where h_t is s_bar alone, for blocks with a local branch in parallel;
            "fast", the streaming paper's, where f and s are one linear map and a GELU, without
            heads or normalisation; "expdecay", which is "full" with weights 0.995^|i - j| in the
            mean, quadratic in time.
        heads: blocks of the block-diagonal linear maps of f and s (n in the paper).
        hidden: channels between the two layers of f and of s; None means `width`, here and below.
        local: channels of f (L).
        summary: channels of s (S); in mode "lite" those of the output.
        output: channels of the output (O) in the other modes.
        layer_norm: normalise f and s_bar; None means yes in "full" and "expdecay", which alone can.
        dropout: rate on what c merges; the code of the paper's numbers has none, later code 0.1.

    Raises:
        InputError: `heads` doesn't divide the channels, or the mode has no heads or no norms.
    """

    def __init__(
        self,
        width: int,
        mode: Mode = "full",
        heads: int = 1,
        hidden: int | None = None,
        local: int | None = None,
        summary: int | None = None,
        output: int | None = None,
        layer_norm: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden, local, summary, output = (
            width if channels is None else channels for channels in (hidden, local, summary, output)
        )
        if mode not in get_args(Mode):
            raise InputError(f"SummaryMixing: no mode {mode!r}; it is {', '.join(get_args(Mode))}.")
        whole = mode in ("full", "expdecay")
        if layer_norm and not whole:
            raise InputError(f"SummaryMixing: mode {mode} has no layer_norm; leave it out.")
        if mode == "fast" and heads != 1:
            raise InputError(f"SummaryMixing: heads={heads}, but mode fast has none; leave it out.")
        norms = whole if layer_norm is None else layer_norm
        self.mode, self.sizes = mode, (local, summary)
        self.f = network(width, hidden, local, heads) if whole else None
        if mode == "fast":  # f's channels too, before those of s
            self.s = nn.Sequential(linear(width, local + summary), nn.GELU())
        else:
            self.s = network(width, hidden, summary, heads)
        self.norm_f = nn.LayerNorm(local) if norms else nn.Identity()
        self.norm_s = nn.LayerNorm(summary) if norms else nn.Identity()
        self.c = Merge(local, summary, output, dropout) if mode != "lite" else None

    def forward(
        self, x: Tensor, valid: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """Mix all frames.

        Args:
            x: (batch, time, width).
            valid: v, (batch, time): 1 or True where a frame is real; None if all are.
            visible: M, (time, time) or (batch, time, time): M_ij is 1 or True where frame i may
                hear frame j; None if all hear all. Costs time x time.

        Returns:
            (batch, time, output). A frame that hears no real frame has s_bar = 0.

        Raises:
            InputError: a mask has another shape.
        """
        _check_masks(x, valid, visible)
        local, s = self.branches(x)
        if self.mode == "expdecay":
            weights = decay_weights(s)
            visible = weights if visible is None else weights * visible
        if visible is None:
            s_bar = mean_of(summed(s, valid), s.dtype)
        else:
            s_bar = windowed_mean(s, valid, visible)
        return self._merged(local, s_bar, valid, x.shape[1])

    def stream(
        self, x: Tensor, past: Summary | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Summary]:
        """Mix the next chunk of a stream: its frames hear one another and all that came before.

        Chunk by chunk this gives what `forward` gives with the `chunk_mask` of the same chunks.

        Args:
            x: the chunk, (batch, time, width); chunks may differ in length.
            past: what the call on the chunk before returned; None at the start.
            valid: as in `forward`, for this chunk.

        Returns:
            (batch, time, output) of the chunk, and what the next call needs.

        Raises:
            InputError: mode "expdecay", which needs all frames at once; a mask has another shape.
        """
        if self.mode == "expdecay":
            raise InputError("SummaryMixing: mode expdecay can't stream; full, lite and fast can.")
        _check_masks(x, valid)
        local, s = self.branches(x)
        now = summed(s, valid)
        if past is not None:
            now = Summary(past.total + now.total, past.frames + now.frames)
        return self._merged(local, mean_of(now, s.dtype), valid, x.shape[1]), now

    def start_at_zero(self) -> "SummaryMixing":
        """Set the last linear map to zero: h = GELU(0) = 0, with a gradient of one half.

        For a branch that is added to something else. Returns the mixer.
        """
        for parameter in (self.s[-2] if self.c is None else self.c).parameters():
            nn.init.zeros_(parameter)
        return self

    def branches(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """f(x), which mode "lite" doesn't have, and s(x), each (batch, time, its channels)."""
        if self.mode == "fast":
            local, s = self.s(x).split(self.sizes, dim=-1)
            return local, s
        return None if self.f is None else self.f(x), self.s(x)

    def _merged(
        self, local: Tensor | None, s_bar: Tensor, valid: Tensor | None, time: int
    ) -> Tensor:
        """h from f and s_bar, the latter (batch, time, channels), or time 1 if all share it."""
        if self.c is None:
            return s_bar.expand(-1, time, -1)
        if valid is not None:
            local = local * valid.unsqueeze(-1).to(local.dtype)
        return self.c(self.norm_f(local), self.norm_s(s_bar))


class Merge(nn.Module):
    """c([l ; m]) = GELU(W [l ; m] + b), as GELU((W_l l + b) + W_m m): W_m m once for a shared m."""

    def __init__(self, local: int, summary: int, output: int, dropout: float) -> None:
        super().__init__()
        self.of_local = nn.Linear(local, output)
        self.of_summary = nn.Linear(summary, output, bias=False)
        self.dropout = dropout
        bound = (local + summary) ** -0.5  # that of nn.Linear for W as a whole
        for part in (self.of_local, self.of_summary):
            nn.init.uniform_(part.weight, -bound, bound)
        nn.init.zeros_(self.of_local.bias)

    def forward(self, local: Tensor, s_bar: Tensor) -> Tensor:
        """l (batch, time, L) and m (batch, time or 1, S) to (batch, time, O)."""
        if self.training and self.dropout > 0:
            s_bar = s_bar.expand(-1, local.shape[1], -1)  # each frame drops channels of its own
        local, s_bar = (F.dropout(part, self.dropout, self.training) for part in (local, s_bar))
        return F.gelu(self.of_local(local) + self.of_summary(s_bar))


class BlockDiagonalLinear(nn.Module):
    """A linear map in which chunk i of the input feeds chunk i of the output alone.

    Weights (n, inputs / n, outputs / n), biases (n, outputs / n).
    """

    def __init__(self, inputs: int, outputs: int, n: int) -> None:
        super().__init__()
        if n < 1 or inputs % n or outputs % n:
            raise InputError(
                f"SummaryMixing: heads={n} must divide the channels on both sides of a linear map, "
                f"{inputs} and {outputs}."
            )
        self.weight = nn.Parameter(torch.empty(n, inputs // n, outputs // n))
        self.bias = nn.Parameter(torch.empty(n, outputs // n))
        bound = (inputs // n) ** -0.5  # Kaiming-uniform with a = sqrt(5), each block by itself
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        chunks = x.unflatten(-1, (self.weight.shape[0], -1))
        y = torch.einsum("...ni,nio->...no", chunks, self.weight)
        return (y + self.bias.to(y.dtype)).flatten(-2)  # under autocast y is in half precision


def linear(inputs: int, outputs: int, heads: int = 1) -> nn.Module:
    """A linear map: plain and starting without bias, or block-diagonal in `heads` blocks."""
    if heads != 1:
        return BlockDiagonalLinear(inputs, outputs, heads)
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.bias)
    return layer


def network(width: int, hidden: int, output: int, heads: int) -> nn.Sequential:
    """f or s: two linear maps with a GELU behind each, the last included."""
    return nn.Sequential(
        linear(width, hidden, heads), nn.GELU(), linear(hidden, output, heads), nn.GELU()
    )


# Means ----------------------------------------------------------------------------------------


def summed(s: Tensor, valid: Tensor | None = None) -> Summary:
    """Sum of the valid frames of s (batch, time, channels), and their number."""
    precise = torch.promote_types(s.dtype, torch.float32)
    if valid is None:
        frames = s.new_full((s.shape[0], 1, 1), s.shape[1], dtype=precise)
    else:
        s = s * valid.unsqueeze(-1).to(s.dtype)
        frames = valid.sum(dim=1, dtype=precise)[:, None, None]
    return Summary(s.sum(dim=1, keepdim=True, dtype=precise), frames)


def mean_of(summary: Summary, dtype: torch.dtype) -> Tensor:
    """The mean in `dtype`, shaped like the total; 0 where there are no frames."""
    frames = summary.frames.masked_fill(summary.frames == 0, 1)
    return (summary.total / frames).to(dtype)


def windowed_mean(s: Tensor, valid: Tensor | None, visible: Tensor) -> Tensor:
    """s_bar_i = sum_j M_ij v_j s_j / sum_j M_ij v_j, (batch, time, channels); arguments as above.

    M may also hold weights instead of zeros and ones.
    """
    precise = torch.promote_types(s.dtype, torch.float32)
    weights = visible.to(precise)
    if valid is not None:
        weights = weights * valid.to(precise).unsqueeze(-2)
    with full_precision(s):
        total = weights @ s.to(precise)
    return mean_of(Summary(total, weights.sum(dim=-1, keepdim=True)), s.dtype)


def decay_weights(s: Tensor) -> Tensor:
    """a^|i - j|, (time, time), for the frames of s (batch, time, channels)."""
    frames = torch.arange(s.shape[1], device=s.device)
    distance = (frames[:, None] - frames).abs()
    return DECAY ** distance.to(torch.promote_types(s.dtype, torch.float32))


def chunk_mask(chunks: Tensor, left: int | None = None) -> Tensor:
    """M of a stream: a frame of chunk q hears the chunks q - left to q, all of each.

    Args:
        chunks: number of each frame's chunk, (time,), never decreasing; for chunks of equal length
            `torch.arange(time) // length`.
        left: chunks heard before one's own; None means all.

    Returns:
        (time, time), True where the frame of the row hears that of the column.
    """
    before = chunks[:, None] - chunks
    return before >= 0 if left is None else (before >= 0) & (before <= left)


def _check_masks(x: Tensor, valid: Tensor | None, visible: Tensor | None = None) -> None:
    batch, time = x.shape[:2]
    if valid is not None and valid.shape != (batch, time):
        raise InputError(
            f"SummaryMixing: the mask of valid frames is {tuple(valid.shape)}; it must be "
            f"(batch, time) = {(batch, time)}, 1 where a frame is real."
        )
    if visible is not None and visible.shape not in ((time, time), (batch, time, time)):
        raise InputError(
            f"SummaryMixing: the visibility mask is {tuple(visible.shape)}; it must be "
            f"(time, time) = {(time, time)}, or one such for each sample."
        )


# Reference ------------------------------------------------------------------------------------


def summary_mixing_reference(
    mixer: SummaryMixing, x: Tensor, valid: Tensor | None = None, visible: Tensor | None = None
) -> Tensor:
    """What `mixer` computes in eval mode, written as in the paper. Quadratic; for tests.

    Every frame must hear a real one.
    """
    batch, time, _ = x.shape
    v = x.new_ones(batch, time) if valid is None else valid.to(x.dtype)
    m = x.new_ones(time, time) if visible is None else visible.to(x.dtype)
    if mixer.mode == "expdecay":
        m = m * decay_weights(x).to(x.dtype)
    local, s = mixer.branches(x)
    weights = m * v[:, None, :]
    s_bar = weights @ s / weights.sum(dim=-1, keepdim=True)
    if mixer.c is None:
        return s_bar
    whole = torch.cat([mixer.c.of_local.weight, mixer.c.of_summary.weight], dim=1)
    merged = torch.cat([mixer.norm_f(v[..., None] * local), mixer.norm_s(s_bar)], dim=-1)
    return F.gelu(F.linear(merged, whole, mixer.c.of_local.bias))
