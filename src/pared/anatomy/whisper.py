"""Whisper (Radford et al., arXiv 2212.04356): its encoder, alone or with the decoder behind it.

The encoder reads mel features of a window of fixed length, 30 seconds, and has no padding mask:
what is shorter is filled up with silence. The feed-forward of a block is two of the block's own
layers and no module, so it is no site.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pared.anatomy.base import Parts
from pared.anatomy.speech import Frames, NoPositions, SpeechEncoder


class Whisper(SpeechEncoder):
    name = "whisper"
    classes = ("WhisperEncoder", "WhisperModel", "WhisperForConditionalGeneration")
    sizes: ClassVar[tuple[dict[str, int], dict[str, int]]] = ({"tokens": 4}, {"tokens": 6})
    parts: ClassVar[Parts] = {"self_attn": ("self_attention", "audio")}
    positions_by = "table"
    whole = "it reads windows of a fixed length"

    @property
    def width(self) -> int:
        return self.config.d_model

    @property
    def heads(self) -> int:
        return self.config.encoder_attention_heads

    def frames(self) -> Frames:
        return Frames()  # silence is as real as speech

    @property
    def positions(self) -> str:
        return self.inside("embed_positions")

    def drop_positions(self) -> None:
        self.replace(self.positions, NoPositions(self.config.max_source_positions))

    def example(
        self, batch: int = 1, tokens: int = 4, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Random features and, for a decoder, tokens, on the model's device; see `run`.

        Args:
            batch: windows.
            tokens: that the decoder is given.
            generator: source of the random numbers (CPU).
        """
        # The second convolution halves the features' frames.
        length = 2 * self.config.max_source_positions
        features = self._random(batch, self.config.num_mel_bins, length, generator=generator)
        if not self.encoder:
            return (features,)
        words = torch.randint(self.config.vocab_size, (batch, tokens), generator=generator)
        return features, words.to(features.device)

    def run(self, model: nn.Module, *example: Any) -> Tensor:
        """The decoder's logits or states, or the encoder's frames where it is alone.

        Args:
            model: what to call; the family's own model or a wrapper of it.
            example: mel features (batch, bins, frames), and for a decoder tokens (batch, tokens).

        Returns:
            (batch, tokens or frames, channels).
        """
        features, *words = example
        given: dict[str, Any] = {}
        if words:
            # Without a cache the decoder reads its positions, which have no values on "meta".
            cache = features.device.type == "meta"
            given = {"decoder_input_ids": words[0], "use_cache": cache}
        output = model(features, **given)
        return output["logits"] if "logits" in output else output["last_hidden_state"]
