"""Attentions that keep their softmax map at one step and apply it to fresh values at later ones."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pared.errors import InputError
from pared.nn.layout import merge_heads, split_heads, to_tokens
from pared.nn.rotary import Rotary, rotate
from pared.runtime import Clock

# At a call: the model's own processor; a map that is kept; one that is reused; its last use.
Mode = Literal["own", "keep", "reuse", "last"]


def softmax_map(
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None = None,
    upcast_attention: bool = False,
    upcast_softmax: bool = False,
) -> Tensor:
    """A = softmax(Q K^T scale + mask), (batch, heads, queries, keys).

    Args:
        query: (batch, heads, queries, channels).
        key: (batch, heads, keys, channels).
        scale: 1/sqrt(d_h), as a rule.
        mask: added to the scores, or True where a key is seen; broadcasts to the map.
        upcast_attention: form the scores in float32.
        upcast_softmax: normalise them in float32.
    """
    if upcast_attention:
        query, key = query.float(), key.float()
    # Ahead of the product: in half precision the unscaled one may overflow.
    scores = (query * scale) @ key.mT
    if mask is not None:
        hidden = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if hidden else scores + mask
    return (scores.float() if upcast_softmax else scores).softmax(dim=-1)


class Memory:
    """What one attention keeps."""

    def __init__(self, clock: Clock, path: str) -> None:
        self.clock, self.path = clock, path

    @property
    def mode(self) -> Mode:
        """Of the running call; an attention that kept nothing computes, whatever the plan."""
        mode = cast(Mode, self.clock.plan)
        if mode == "keep" or self.path in self.clock.kept:
            return mode
        return "keep" if mode == "reuse" else "own"

    def begun(self) -> Mode:
        """The same, where the attention runs: it is noted for the count."""
        mode = self.mode
        self.clock.done[self.path] = "reused" if mode in ("reuse", "last") else "computed"
        return mode

    def keep(self, kept: Tensor) -> None:
        """Remember a map or an output."""
        self.clock.kept[self.path] = kept.detach()

    def recall(self) -> Tensor:
        """What was kept; dropped where this is its last use."""
        kept = self.clock.kept
        return kept.pop(self.path) if self.mode == "last" else kept[self.path]


class Processor:
    """An attention's processor: its own where nothing is kept or reused.

    Args:
        memory: of this attention.
        own: its processor as it was.
        keep_output: where the values come from a prompt, keep the product and not the map.
    """

    def __init__(self, memory: Memory, own: Any, keep_output: bool) -> None:
        self.memory, self.own, self.keep_output = memory, own, keep_output


class MapReuse(Processor):
    """The processor of a self- or cross-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        mode = self.memory.begun()
        if mode == "own":
            extra = {} if temb is None else {"temb": temb}
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, **extra)
        x = hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        if x.ndim == 4:
            x = to_tokens(x)
        if attn.group_norm is not None:
            x = attn.group_norm(x.mT).mT
        y = self.output(attn, x, encoder_hidden_states, attention_mask, mode)
        if hidden_states.ndim == 4:
            y = y.mT.reshape(hidden_states.shape)
        if attn.residual_connection:
            y = y + hidden_states
        return y / attn.rescale_output_factor

    def output(
        self, attn: Any, x: Tensor, prompt: Tensor | None, mask: Tensor | None, mode: Mode
    ) -> Tensor:
        """A V W_o, (batch, tokens, width), or what was kept of it."""
        constant = self.keep_output and prompt is not None
        if constant and mode != "keep":
            return self.memory.recall()
        context = x if prompt is None else prompt
        if prompt is not None and attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(prompt)
        value = split_heads(attn.to_v(context), attn.heads)
        if mode == "keep":
            weights = self.weights(attn, x, context, mask).to(value.dtype)
        else:
            weights = self.memory.recall()
        y = projected(attn, merge_heads(weights @ value))
        if mode == "keep":
            self.memory.keep(y if constant else weights)
        return y

    def weights(self, attn: Any, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """The softmax map, (batch, heads, queries, keys)."""
        query = split_heads(attn.to_q(x), attn.heads)
        key = split_heads(attn.to_k(context), attn.heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if mask is not None:
            batch, keys = context.shape[:2]
            mask = attn.prepare_attention_mask(mask, keys, batch).unflatten(0, (batch, attn.heads))
        return softmax_map(query, key, attn.scale, mask, attn.upcast_attention, attn.upcast_softmax)


class VideoMapReuse(Processor):
    """The processor of an attention of Wan, which normalises queries and keys across all heads.

    An output that is kept is that of its own processor, which may have mixed in a picture's
    features by a softmax of their own.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        mode, x, prompt = self.memory.begun(), hidden_states, encoder_hidden_states
        constant = self.keep_output and prompt is not None
        if mode == "own" or (mode == "keep" and constant):
            y = self.own(attn, x, prompt, attention_mask, rotary_emb)
            if mode == "keep":
                self.memory.keep(y)
            return y
        if constant:
            return self.memory.recall()
        context = x if prompt is None else prompt
        value = split_heads(attn.to_v(context), attn.heads)
        if mode == "keep":
            query, key = self.turned(attn, x, context, rotary_emb)
            scale = query.shape[-1] ** -0.5
            weights = softmax_map(query, key, scale, attention_mask).to(value.dtype)
            self.memory.keep(weights)
        else:
            weights = self.memory.recall()
        return projected(attn, merge_heads(weights @ value))

    def turned(
        self, attn: Any, x: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, (batch, heads, tokens, channels), turned by their tokens' angles."""
        query = split_heads(attn.norm_q(attn.to_q(x)), attn.heads)
        key = split_heads(attn.norm_k(attn.to_k(context)), attn.heads)
        if rotary is None:
            return query, key
        of_tokens = Rotary(*(part.transpose(1, 2) for part in rotary))
        return rotate(query, of_tokens), rotate(key, of_tokens)


class JointMapReuse(Processor):
    """The processor of a joint attention of image and text, in one stream or in two.

    Text comes first, as rotary positions are given. Values are never a prompt's alone.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        mode, image, text = self.memory.begun(), hidden_states, encoder_hidden_states
        if mode == "own":
            return self.own(attn, image, text, attention_mask, image_rotary_emb)
        if attention_mask is not None:
            raise InputError(
                "attention-map-reuse takes no attention mask in a joint attention; call the model "
                "without one."
            )
        value = joined(attn, "v", image, text)
        if mode == "keep":
            weights = self.weights(attn, image, text, image_rotary_emb).to(value.dtype)
            self.memory.keep(weights)
        else:
            weights = self.memory.recall()
        y = merge_heads(weights @ value)
        if text is None:
            return y
        y_text, y_image = y.split([y.shape[1] - image.shape[1], image.shape[1]], dim=1)
        text_out = None if attn.context_pre_only else attn.to_add_out(y_text)
        return projected(attn, y_image), text_out

    def weights(
        self,
        attn: Any,
        image: Tensor,
        text: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The softmax map; its queries are the image's alone where the text's result isn't used."""
        query = joined(attn, "q", image, None if attn.context_pre_only else text)
        key = joined(attn, "k", image, text)
        if rotary is not None:
            of_query = slice(key.shape[-2] - query.shape[-2], None)
            query, key = rotate(query, Rotary(*rotary).at(of_query)), rotate(key, Rotary(*rotary))
        return softmax_map(query, key, query.shape[-1] ** -0.5)


def projected(attn: Any, y: Tensor) -> Tensor:
    """Merged heads y as the attention puts them out, (batch, tokens, width)."""
    for layer in attn.to_out:  # a linear map, then dropout
        y = layer(y)
    return y


def joined(attn: Any, role: Literal["q", "k", "v"], image: Tensor, text: Tensor | None) -> Tensor:
    """Heads of text and image tokens, normalised, (batch, heads, tokens, channels)."""
    parts = [_heads(attn, getattr(attn, f"to_{role}"), f"norm_{role}", image)]
    if text is not None:
        added = getattr(attn, f"add_{role}_proj")
        parts.insert(0, _heads(attn, added, f"norm_added_{role}", text))
    return torch.cat(parts, dim=-2)


def _heads(attn: Any, projection: nn.Module, norm: str, x: Tensor) -> Tensor:
    heads = split_heads(projection(x), attn.heads)
    normalise = getattr(attn, norm, None)  # values have none
    return heads if normalise is None else normalise(heads)
