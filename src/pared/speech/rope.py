"""Benchmarking Rotary Position Embeddings for Automatic Speech Recognition.

arXiv 2501.06051, 2025; rotary positions are RoFormer's (arXiv 2104.09864).

The self-attentions of a speech encoder rotate queries and keys by the number of the frame, and
attend by one fused kernel, or whatever `set_attn_implementation` says. Relative positions as in
Transformer-XL, which Conformers usually have, need a second matrix of scores, heads x T x (2T - 1)
for T frames, which has to be formed first, whatever kernel adds it to the others.

Implemented from the paper; no code taken. Neighbouring channels form a pair, all channels of a head
turn, values don't, t counts frames of the encoder. Positions that the model had go: what a
Conformer's attentions get of them, with their weights, and the table of Whisper; the convolution of
wav2vec 2.0 stays unless `conv_positions` is off. All stay as long as another layer needs them, a
stock attention or, but in a Conformer, a mean over the frames (`summarymixing-asr`). Departures:
angles are computed anew in every layer, in float32 at least, instead of kept for lengths up to the
next power of two, since that is a thousandth of a layer's work; scores are divided by the root of a
head's channels, where the paper's code takes the model's (`scale_dim`); padding is left out of the
block's convolution too, as in that code. WavLM isn't served: its first attention makes a bias of
positions that all later ones get handed on, so they can't be replaced one by one. What transformers
calls "rotary" in its Conformer is something else, it rotates what queries and keys are projected
from, and scores then depend on positions themselves; `legacy_hf` keeps that for weights that were
trained so. With `streaming` the convolutions become Dynamic Chunk Convolutions; a stream keeps the
frames heard before and counts positions from the first of them. Projections are kept and nothing is
added, but a model that wasn't trained with rotated queries must learn them. Not verified: error
rates at the paper's scale.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pared.anatomy import Family, Site
from pared.anatomy.base import Role
from pared.anatomy.speech import SpeechEncoder
from pared.errors import InputError
from pared.info import Headline, Info
from pared.method import Claim
from pared.nn.attention import attend
from pared.nn.layout import merge_heads, split_heads
from pared.nn.rotary import Rotary, half_split, interleaved, rotary_of, rotate
from pared.speech.encoder_conversion import EncoderConversion
from pared.speech.hearing import Hearing

INFO = Info(
    slug="rope-asr",
    title="Benchmarking Rotary Position Embeddings for Automatic Speech Recognition",
    arxiv="2501.06051",
    venue="2025",
    kind="conversion",
    families=("conformer", "wav2vec2", "whisper"),
    training=True,
    trained_by="recipe",
    exact=False,
    maturity="faithful",
    summary="queries and keys of a speech encoder rotated by their frame, one fused softmax",
    cls="RoPE",
    headlines=(
        Headline(
            key="errors-over-relative",
            text="word error rate of a Conformer, rotary over relative positions "
            "(paper: 1.96 / 1.97 on LibriSpeech test-clean)",
            paper=0.995,
            direction="lower",
            bound=1.1,
        ),
        Headline(
            key="training-time",
            text="time of a training step of a Conformer, relative over rotary positions "
            "(paper: 13 % less on LibriSpeech)",
            paper=1.15,
            direction="higher",
            bound=1.05,
        ),
        Headline(
            key="parameters",
            text="parameters of the default Wav2Vec2ConformerModel, relative less rotary, "
            "in millions (12 layers of D^2 + 2 D at D = 768)",
            paper=7.1,
            direction="higher",
            bound=7.0,
        ),
    ),
)

ROLES: tuple[Role, ...] = ("q", "k", "v", "out")
# Words in the names of implementations whose masks are of another form, kernels of the hub too.
OWN_MASKS = ("flash", "flex", "paged")


class RoPE(EncoderConversion):
    """softmax(scale R_t q_t . R_s k_s), section 2 of the paper."""

    info = INFO

    base: float | None = Field(
        default=None,
        gt=1,
        description="of the frequencies theta_i = base^(-2i/d); None means the model's own, else "
        "10000",
    )
    scale_dim: Literal["head", "model"] = Field(
        default="head",
        description="scores are divided by the root of the channels of a head, or of the model as "
        "in the paper's code",
    )
    conv_positions: bool = Field(
        default=True,
        description="keep a convolution that tells positions; leave it out for training from "
        "scratch",
    )
    legacy_hf: bool = Field(
        default=False,
        description="rotate what queries and keys are projected from, as transformers' Conformer "
        "does that calls itself rotary",
    )

    def claims(self, family: Family) -> list[Claim]:
        if (family.width // family.heads) % 2:
            raise InputError(
                f"{self.info.slug} turns pairs of channels, and the heads of this "
                f"{type(family.model).__name__} have {family.width // family.heads}; it serves "
                "heads of an even number."
            )
        if self.legacy_hf and not family.rotates_inputs:
            raise InputError(
                f"{self.info.slug}: legacy_hf is for models whose position_embeddings_type is "
                f"'rotary', and this {type(family.model).__name__} has another; leave it out."
            )
        return super().claims(family)

    def attention(self, family: SpeechEncoder, site: Site, hearing: Hearing) -> nn.Module:
        names = {role: family.linear_layers(site, role)[0].rpartition(".")[2] for role in ROLES}
        return RotaryAttention(
            site.module,
            names,
            family.config,
            family.heads,
            self.base or family.rotary_base,
            (family.width if self.scale_dim == "model" else family.width // family.heads) ** -0.5,
            self.legacy_hf,
            family.attention_dropout,
            hearing,
            site.path,
        )

    def drops_positions(self, family: SpeechEncoder) -> bool:
        return family.positions_by != "convolution" or not self.conv_positions


class RotaryAttention(nn.Module):
    """A self-attention with rotary positions, in the form that transformers' layers call.

    Args:
        attention: whose projections it takes over, under their names.
        names: of the projections, by role.
        config: of the model, which knows how attention is computed.
        heads: of the attention.
        base: of the frequencies.
        scale: of the scores.
        legacy: rotate the input of the projections, in the half-split layout.
        dropout: rate on the attention map.
        hearing: of the model.
        path: under which it keeps what it remembers.
    """

    def __init__(
        self,
        attention: nn.Module,
        names: dict[Role, str],
        config: Any,
        heads: int,
        base: float,
        scale: float,
        legacy: bool,
        dropout: float,
        hearing: Hearing,
        path: str,
    ) -> None:
        super().__init__()
        for name in names.values():
            setattr(self, name, getattr(attention, name))
        self.names, self.config, self.num_heads = names, config, heads
        self.base, self.scale, self.legacy, self.dropout = base, scale, legacy, dropout
        self.hearing, self.path = hearing, path

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Mixed frames, (batch, frames, width) in and out, and no attention map."""
        x, mask = self._heard(hidden_states)
        self._check_mask(mask)
        q, k, v = self.heads_of(x)
        now = slice(x.shape[1] - hidden_states.shape[1], None)  # a stream's frames stand before
        y = attend(self, q[:, :, now], k, v, mask, self.scale, self.dropout)
        return self._projected("out", y), None

    def heads_of(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys that know their positions, and values.

        Args:
            x: (batch, frames, width).
            start: position of the first frame.

        Returns:
            Each (batch, heads, frames, channels).
        """
        precise = torch.promote_types(x.dtype, torch.float32)
        frames = torch.arange(x.shape[1], dtype=precise, device=x.device) + start
        rotary = rotary_of(frames, x.shape[-1] // self.num_heads, self.base)
        turned = self._turned(x, rotary) if self.legacy else x
        q, k = (split_heads(self._projected(role, turned), self.num_heads) for role in ("q", "k"))
        v = split_heads(self._projected("v", x), self.num_heads)
        return (q, k, v) if self.legacy else (rotate(q, rotary), rotate(k, rotary), v)

    def _check_mask(self, mask: Tensor | None) -> None:
        name = self.config._attn_implementation
        if mask is not None and any(word in name for word in OWN_MASKS):
            raise InputError(
                f"{INFO.slug}: {name} takes no mask of which frame hears which; call "
                "model.set_attn_implementation('sdpa'), or give utterances of one length."
            )

    def _turned(self, x: Tensor, rotary: Rotary) -> Tensor:
        pairs = interleaved(split_heads(x, self.num_heads))
        return merge_heads(half_split(rotate(pairs, rotary)))

    def _projected(self, role: Role, x: Tensor) -> Tensor:
        return getattr(self, self.names[role])(x)

    def _heard(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """All frames that the call's frames hear, and which hears which.

        Returns:
            (batch, frames, width), those of a stream's past first, and True where a frame is heard,
            (batch, 1, 1 or frames, frames); None where all are.
        """
        hearing, valid = self.hearing, self.hearing.valid
        if hearing.kept is not None:
            if valid is None:
                valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            chunks = (*hearing.kept.get(self.path, ()), (x, valid))
            hearing.kept[self.path] = hearing.kept_chunks(chunks)
            x, valid = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
            return x, heard(valid, None)
        return x, heard(valid, hearing.visible(x))


def heard(valid: Tensor | None, visible: Tensor | None) -> Tensor | None:
    """The mask of an attention from that of the padding and that of the chunks.

    A row of nothing but False would give NaN; padding is left to hear something, whatever it is.

    Args:
        valid: (batch, keys), True where a frame is real; None if all are.
        visible: (queries, keys), True where a query hears a key; None if all do.

    Returns:
        True where a key is heard, (batch or 1, 1, queries or 1, keys); None where all are.
    """
    if visible is None:
        if valid is None:
            return None
        return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]
    mask = visible[None, None]
    if valid is None:
        return mask
    itself = torch.eye(visible.shape[0], dtype=torch.bool, device=visible.device)
    return (mask & valid[:, None, None]) | itself
