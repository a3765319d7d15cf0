"""What the frames of a converted encoder hear: padding, chunks, and the past of a stream.

An encoder that attends to whole utterances can be trained to work on streams as well (Dynamic Chunk
Training, as in arXiv 2409.07165): now and then the frames are cut into chunks, and a frame hears
its own chunk and some before it. Such a mask costs as much as hearing all; a stream, which gives
the same, takes chunk after chunk and remembers of the past what its layers need.

`set_chunks` is the mask, `EncoderStream` the stream. A conversion with `streaming` draws new chunks
for every training batch.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Site
from pared.anatomy.speech import Frames, SpeechEncoder
from pared.errors import InputError
from pared.nn.summary_mixing import chunk_mask

# Dynamic Chunk Training as the streaming paper has it, in frames and chunks.
CHUNKED = 0.6
CHUNK = (8, 32)
LIMITED = 0.75
LEFT = (2, 32)


class Hearing:
    """How far frames hear, known to all converted layers of a model.

    It is itself a forward pre-hook of the encoder, which draws chunks in training.

    Args:
        frames: which frames of a call are real.

    Attributes:
        chunk: frames of a chunk, or of each chunk in turn; None: all frames hear all.
        left: chunks that a frame hears before its own; None: all.
        draws: whether chunks are drawn anew at every call in training, where `told` doesn't count.
        told: chunk and left as they were set, for all other calls.
        kept: what the layers remember of the stream that is running, by path; None where none is.
        seen: frames of that stream before the call.
    """

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.chunk: int | tuple[int, ...] | None = None
        self.left: int | None = None
        self.draws = False
        self.told: tuple[int | tuple[int, ...] | None, int | None] = (None, None)
        self.kept: dict[str, Any] | None = None
        self.seen = 0

    def __call__(self, module: nn.Module, args: tuple) -> None:
        drawn = self.draws and module.training
        self.chunk, self.left = drawn_chunks() if drawn else self.told

    @property
    def valid(self) -> Tensor | None:
        """(batch, frames) of the running call, True where a frame is real; None if all are."""
        return self.frames.valid

    def visible(self, x: Tensor) -> Tensor | None:
        """Which frame (row) hears which, (frames, frames), of x (batch, frames, width).

        None where all hear all.

        Raises:
            InputError: the chunks' lengths were given, and are those of another number of frames.
        """
        if self.chunk is None:
            return None
        frames = x.shape[1]
        if isinstance(self.chunk, int):
            numbers = torch.arange(frames, device=x.device) // self.chunk
        elif sum(self.chunk) != frames:
            raise InputError(
                f"chunks of {self.chunk} frames were set, {sum(self.chunk)} in all, and the "
                f"encoder got {frames}; set chunks of just these."
            )
        else:
            told = [number for number, length in enumerate(self.chunk) for _ in range(length)]
            numbers = torch.tensor(told, device=x.device)
        return chunk_mask(numbers, self.left)

    def kept_chunks(self, chunks: tuple) -> tuple:
        """Of what a layer keeps of each chunk so far, what those to come hear."""
        return chunks if self.left is None else chunks[max(0, len(chunks) - self.left) :]


def hearing_of(model: nn.Module) -> Hearing:
    """The `Hearing` of a model, the same at every call."""
    inner = cast(Any, anatomy.unwrap(model))
    if not hasattr(inner, "pared_hearing"):
        family = _encoder(inner)
        inner.pared_hearing = Hearing(family.frames())
        encoder = inner.get_submodule(family.encoder)
        encoder.register_forward_pre_hook(inner.pared_hearing)
    return inner.pared_hearing


def set_chunks(
    model: nn.Module, chunk: int | Sequence[int] | None, left: int | None = None
) -> None:
    """Let the converted layers of an encoder hear in chunks, from the next call on.

    One that was converted with `streaming` goes on drawing chunks where it trains.

    Args:
        model: converted by a method of this folder.
        chunk: frames of a chunk, or of each chunk in turn; None: all frames hear all.
        left: chunks that a frame hears before its own; None: all.

    Raises:
        InputError: a number that can't be, or a model without converted layers.
    """
    lengths = () if chunk is None else (chunk,) if isinstance(chunk, int) else tuple(chunk)
    if any(length < 1 for length in lengths) or (left is not None and left < 0):
        raise InputError(
            f"chunks of {chunk} frames with {left} before each can't be; give at least 1 and 0, "
            "or None."
        )
    attentions = _encoder(model).sites("self_attention")
    if not any(hasattr(site.module, "hearing") for site in attentions):
        raise InputError(
            f"the layers of this {type(anatomy.unwrap(model)).__name__} hear all frames; convert "
            "it first, e.g. pared.convert(model, SummaryMixing())."
        )
    hearing = hearing_of(model)
    hearing.told = (lengths if isinstance(chunk, Sequence) else chunk, left)
    hearing.chunk, hearing.left = hearing.told


def drawn_chunks(generator: torch.Generator | None = None) -> tuple[int | None, int | None]:
    """Chunk and left context of one training batch, as the streaming paper draws them.

    With probability 0.6 chunks of 8 to 32 frames, and then with 0.75 only 2 to 32 chunks before
    each; frames are those of 40 ms.

    Args:
        generator: of random numbers (CPU); None is torch's own.
    """
    chunked, limited = torch.rand(2, generator=generator).tolist()
    if chunked >= CHUNKED:
        return None, None
    chunk, left = (
        int(torch.randint(low, high + 1, (), generator=generator)) for low, high in (CHUNK, LEFT)
    )
    return chunk, left if limited < LIMITED else None


def _encoder(model: nn.Module) -> SpeechEncoder:
    family = anatomy.of(model)
    if not isinstance(family, SpeechEncoder):
        raise family.refuse("a stream of frames", f"it is a {family.kind}.")
    return family


# Convolutions -------------------------------------------------------------------------------------


class FrameConvolution(nn.Module):
    """A depthwise convolution over frames that hears no padding, and no chunk behind its own.

    Dynamic Chunk Convolution: in front of a chunk's first frame stand the last ones of the chunk
    before, behind its last frame zeros.

    Args:
        conv: what it replaces, with an odd kernel and as many outputs as inputs, or another one of
            these; its weights are taken over.
        hearing: of the model.
        path: under which it keeps what it remembers.
    """

    def __init__(self, conv: nn.Conv1d, hearing: Hearing, path: str) -> None:
        super().__init__()
        self.weight, self.bias, self.kernel_size = conv.weight, conv.bias, conv.kernel_size
        self.hearing, self.path = hearing, path
        self.reach = self.kernel_size[0] // 2

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, frames) to the same shape."""
        hearing, reach = self.hearing, self.reach
        if hearing.valid is not None:
            x = x * hearing.valid.unsqueeze(1).to(x.dtype)
        if hearing.kept is not None:
            y, hearing.kept[self.path] = self._continued(x, hearing.kept.get(self.path))
            return y
        if hearing.chunk is None:
            return self._convolved(F.pad(x, (reach, reach)))
        if isinstance(hearing.chunk, int):
            return self._chunked(x, hearing.chunk)
        parts, before = [], None
        for part in x.split(hearing.chunk, dim=-1):
            y, before = self._continued(part, before)
            parts.append(y)
        return torch.cat(parts, dim=-1)

    def _continued(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """One chunk behind the last frames before it, and its own last frames."""
        x = F.pad(x, (self.reach, 0)) if before is None else torch.cat([before, x], dim=-1)
        return self._convolved(F.pad(x, (0, self.reach))), x[..., x.shape[-1] - self.reach :]

    def _chunked(self, x: Tensor, chunk: int) -> Tensor:
        """All chunks of one length at once."""
        frames = x.shape[-1]
        x = F.pad(x, (self.reach, -frames % chunk))
        chunks = x.unfold(-1, self.reach + chunk, chunk)  # (batch, channels, chunks, frames of one)
        y = self._convolved(F.pad(chunks.transpose(1, 2).flatten(0, 1), (0, self.reach)))
        return y.unflatten(0, (len(x), -1)).transpose(1, 2).flatten(2)[..., :frames]

    def _convolved(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias, groups=len(self.weight))


def leave_out_padding(model: nn.Module, sites: Iterable[Site] | None = None) -> None:
    """Let the convolutions of an encoder's blocks hear no padding.

    Conversions do it to the blocks that they convert. A stock model that they are compared with
    needs it too: transformers' Conformer hands its convolutions no mask. The batch norm behind them
    stays transformers' own, which in training counts padded frames in its mean and variance.

    Args:
        model: a speech encoder, alone or under a head; changed in place.
        sites: of the convolutions; None: all.
    """
    family, hearing = _encoder(model), hearing_of(model)
    for site in family.sites("convolution") if sites is None else sites:
        path = f"{site.path}.{family.convolution}"
        conv = cast(nn.Conv1d, family.model.get_submodule(path))
        family.replace(path, FrameConvolution(conv, hearing, path).train(conv.training))


# The stream ---------------------------------------------------------------------------------------


class EncoderStream:
    """A batch of utterances through a converted encoder, chunk after chunk.

    What it gives is what the encoder gives for all frames at once under `set_chunks` with chunks of
    the same lengths, which may be any. The limit to the left counts chunks, and is that of
    `set_chunks`.

    Args:
        model: all attentions and convolutions of its encoder converted by methods of this folder.

    Raises:
        InputError: a layer isn't converted, or the encoder can't work on streams.
    """

    def __init__(self, model: nn.Module) -> None:
        family = _encoder(model)
        if family.whole:
            raise family.refuse("a stream of frames", f"{family.whole}.")
        for site in family.sites("self_attention", "convolution"):
            path = f"{site.path}.{family.convolution}" if site.kind == "convolution" else site.path
            if not hasattr(family.model.get_submodule(path), "hearing"):
                raise InputError(
                    f"{path} hears the whole utterance; convert all layers of the encoder before "
                    "streaming."
                )
        self._encoder = family.model.get_submodule(family.encoder)
        self._hearing = hearing_of(model)
        self._kept: dict[str, Any] = {}
        self._seen = 0

    def __call__(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """What the encoder makes of the next frames.

        Args:
            x: (batch, frames, width), as the encoder's first block gets them.
            valid: (batch, frames), True where a frame is real; None if all are.

        Returns:
            (batch, frames, width).
        """
        hearing = self._hearing
        hearing.kept, hearing.seen = self._kept, self._seen
        try:
            # A copy, since the encoder writes zeros where frames are padded.
            output = self._encoder(x.clone(), attention_mask=valid)
        finally:
            hearing.kept, hearing.seen = None, 0
        self._seen += x.shape[1]
        return output.last_hidden_state
