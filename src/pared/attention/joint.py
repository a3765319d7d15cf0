"""What all replacements of a joint attention share: image and text that meet in one softmax.

Serves the two-stream blocks of SD3 and FLUX, which project text by weights of its own, and FLUX's
one-stream blocks, whose input is one sequence of both.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pared.attention.processors import AttentionProcessor
from pared.errors import InputError
from pared.nn.layout import merge_heads, split_heads
from pared.nn.rotary import Rotary, rotate


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of one stream, each (batch, heads, tokens, channels)."""

    query: Tensor
    key: Tensor
    value: Tensor


def all_keys(image: Heads, text: Heads) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens; their order is all one to an attention."""
    return (
        torch.cat([image.key, text.key], dim=-2),
        torch.cat([image.value, text.value], dim=-2),
    )


class JointProcessor(AttentionProcessor):
    """The processor of an attention of image and text.

    Subclasses implement `mix`, and override `image_heads` where image tokens need more than the
    attention's own projections.
    """

    @abstractmethod
    def mix(self, image: Heads, text: Heads, text_wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Mixed image and text tokens, each (batch, heads, tokens, channels).

        Args:
            image: heads of the image tokens, normalised and rotated.
            text: heads of the text tokens.
            text_wanted: whether the block uses the text's result; where not, None will do for it.
        """

    def image_heads(self, attn: Any, x: Tensor, rotary: Rotary | None) -> Heads:
        """Heads of the image tokens `x` (batch, tokens, width), normalised and rotated."""
        return self.projected(attn, x, rotary)

    def projected(self, attn: Any, x: Tensor, rotary: Rotary | None, added: bool = False) -> Heads:
        """Heads of tokens by the attention's own projections, or by those it has for text alone."""
        if added:
            q, k, v = attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x)
            norms = attn.norm_added_q, attn.norm_added_k
        else:
            q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
            norms = attn.norm_q, attn.norm_k
        q, k, v = (split_heads(part, attn.heads) for part in (q, k, v))
        q, k = (
            part if norm is None else norm(part) for part, norm in zip((q, k), norms, strict=True)
        )
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return Heads(q, k, v)

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **ignored: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        if attention_mask is not None:
            raise InputError(f"{type(self).__name__} mixes all tokens and takes no attention mask.")
        if encoder_hidden_states is None:
            return self._one_stream(attn, hidden_states, image_rotary_emb)
        length = hidden_states.shape[1] + encoder_hidden_states.shape[1]
        of_image, of_text = self._rotary(image_rotary_emb, length)
        y_image, y_text = self.mix(
            self.image_heads(attn, hidden_states, of_image),
            self.projected(attn, encoder_hidden_states, of_text, added=True),
            text_wanted := not attn.context_pre_only,
        )
        y_image = merge_heads(y_image)
        for layer in attn.to_out:  # a linear map, then dropout
            y_image = layer(y_image)
        if not text_wanted:
            return y_image, None
        return y_image, attn.to_add_out(merge_heads(y_text))

    def _one_stream(self, attn: Any, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        of_image, of_text = self._rotary(rotary, x.shape[1])
        image, text = self.grid.streams(x.shape[1])
        y_image, y_text = self.mix(
            self.image_heads(attn, x[:, image], of_image),
            self.projected(attn, x[:, text], of_text),
            True,
        )
        parts = (y_image, y_text) if self.grid.image_first else (y_text, y_image)
        return torch.cat([merge_heads(part) for part in parts], dim=1)

    def _rotary(
        self, rotary: tuple[Tensor, Tensor] | None, length: int
    ) -> tuple[Rotary | None, Rotary | None]:
        """The rotations of image and of text tokens."""
        if rotary is None:
            return None, None
        image, text = self.grid.streams(length)
        return Rotary(*rotary).at(image), Rotary(*rotary).at(text)
