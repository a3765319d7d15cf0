"""Speech encoders: blocks over frames of audio, alone, under a CTC head, or before a decoder.

What a method needs to know of a call beyond its frames is which of them are padding: `Frames`.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pared.anatomy.base import Block, Family, Parts, block_of, part_of


class Frames:
    """Which frames of the call that is running are real.

    It is itself the forward pre-hook of the encoder that keeps it up to date; copies of a model
    copy it along. Families install it through `SpeechEncoder.frames`.

    Attributes:
        valid: (batch, frames), True where a frame is real and False where it is padding; None where
            no mask was given, and then all are real.
    """

    def __init__(self) -> None:
        self.valid: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # The masks of the layers have other shapes and polarities, and are None or not by value.
        self.valid = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)


class NoPositions(nn.Module):
    """In the place of what adds positions to the frames: adds zero.

    Args:
        number: of positions, where the model asks for it.
    """

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.num_embeddings = number

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


class SpeechEncoder(Family):
    """Access to a speech encoder and to what stands around it.

    Blocks and sites are those of the encoder; a decoder behind it has none.

    Attributes:
        parts: kinds and streams of a block's submodules.
        convolution: name of the layer in a convolution site that mixes frames.
        positions_by: how the frames learn their positions: in the attentions, from a table, or by a
            convolution.
        whole: why the encoder can't work on a stream, as the end of a sentence; "" where it can,
            once its attentions and convolutions keep to the frames they have heard.
        spare: ends of the names of weights that published checkpoints may lack.
    """

    kind = "speech encoder"
    parts: ClassVar[Parts]
    convolution: ClassVar[str] = ""
    positions_by: ClassVar[Literal["attention", "table", "convolution"]]
    whole: ClassVar[str] = ""
    # What masked frames get in training; nothing reads it otherwise.
    spare: ClassVar[tuple[str, ...]] = ("masked_spec_embed",)

    @property
    def encoder(self) -> str:
        """Dotted path of the encoder; "" where it is the model itself."""
        inner: Any = self.model
        prefix = inner.base_model_prefix
        if part_of(inner, prefix) is None:
            prefix = ""
        has = part_of(inner, f"{prefix}.encoder" if prefix else "encoder") is not None
        return ".".join(name for name in (prefix, "encoder" if has else "") if name)

    def inside(self, name: str) -> str:
        """Dotted path of something in the encoder."""
        return f"{self.encoder}.{name}" if self.encoder else name

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            block_of(index, path, module, self.parts, ("audio",))
            for index, (path, module) in enumerate(self._list(self.inside("layers")))
        )

    @property
    def width(self) -> int:
        """Channels of a frame."""
        return self.config.hidden_size

    @property
    def heads(self) -> int:
        """Heads of an attention."""
        return self.config.num_attention_heads

    @property
    def attention_dropout(self) -> float:
        """Rate at which training drops weights of the attention maps."""
        return self.config.attention_dropout

    # The frames of a call -------------------------------------------------------------------------

    def frames(self) -> Frames:
        """Which frames are real; follows every call of the encoder from now on."""
        encoder = self.model.get_submodule(self.encoder)
        for hook in encoder._forward_pre_hooks.values():
            if isinstance(hook, Frames):
                return hook
        fresh = Frames()
        encoder.register_forward_pre_hook(fresh, with_kwargs=True)
        return fresh

    # Positions ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def positions(self) -> str:
        """Dotted path of what tells the frames their positions; "" where nothing does."""

    @abstractmethod
    def drop_positions(self) -> None:
        """Leave the frames without positions, for attentions that have their own or need none."""

    def add_positions(self, module: nn.Module) -> None:
        """Let `module`, (batch, frames, width) in and out, add positions before the first block.

        For families whose attentions know positions otherwise.
        """
        raise NotImplementedError

    @property
    def rotary_base(self) -> float:
        """Base of the frequencies of rotary positions, as the configuration has it."""
        return getattr(self.config, "rotary_embedding_base", 10_000.0)

    @property
    def rotates_inputs(self) -> bool:
        """Whether attentions rotate what queries and keys are projected from."""
        return False


class AudioEncoder(SpeechEncoder):
    """A speech encoder behind a convolutional network that reads the waveform itself."""

    sizes: ClassVar[tuple[dict[str, int], dict[str, int]]] = ({"samples": 2000}, {"samples": 2600})

    @property
    def reader(self) -> str:
        """Dotted path of what is called with samples and their mask; "" where it is the model."""
        inner: Any = self.model
        prefix: str = inner.base_model_prefix
        return prefix if part_of(inner, prefix) is not None else ""

    @property
    def front(self) -> str:
        """Dotted path of the first layer, a convolution over samples and what belongs to it."""
        return ".".join(filter(None, (self.reader, "feature_extractor.conv_layers.0")))

    def lengthen(self, samples: int) -> None:
        """Let the model count its frames as those of sounds with `samples` more, from now on.

        For what takes the place of `front` and reads beyond the ends of a sound.
        """
        for module in self.model.modules():
            if hasattr(module, "_get_feat_extract_output_lengths"):
                counts: Any = module
                counts._get_feat_extract_output_lengths = _Lengthened(counts, samples)

    def example(
        self,
        batch: int = 1,
        samples: int = 16_000,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Random audio and its mask, on the model's device; see `run`.

        Args:
            batch: utterances; every second one is padded by a quarter.
            samples: of the longest; by default a second's.
            generator: source of the random numbers (CPU).
        """
        audio = self._random(batch, samples, generator=generator)
        if audio.device.type == "meta":  # whose masks can't be asked whether they mask anything
            return audio, None
        length = torch.full((batch, 1), samples, device=audio.device)
        length[1::2] = samples * 3 // 4
        mask = (torch.arange(samples, device=audio.device) < length).long()
        return audio * mask, mask

    def run(self, model: nn.Module, *example: Any) -> Tensor:
        """Logits, projected frames or frames: what the model has behind its encoder.

        Args:
            model: what to call; the family's own model or a wrapper of it.
            example: audio (batch, samples) at 16 kHz, and 1 where it is real and 0 where it is
                padding, in the same shape; None where nothing is padded.

        Returns:
            (batch, frames, channels).
        """
        audio, mask = example
        output = model(audio, attention_mask=mask)
        known = ("logits", "projected_states", "last_hidden_state")
        return next(output[name] for name in known if output.get(name) is not None)


class _Lengthened:
    """Counts frames as a model's class does, of sounds with some samples more."""

    def __init__(self, model: Any, samples: int) -> None:
        self.model, self.samples = model, samples

    def __call__(self, input_lengths: Any, *args: Any, **kwargs: Any) -> Any:
        cls = type(self.model)
        longer = input_lengths + self.samples
        return cls._get_feat_extract_output_lengths(self.model, longer, *args, **kwargs)
