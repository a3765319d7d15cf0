"""SummaryMixing: A Linear-Complexity Alternative to Self-Attention for Speech Recognition and
Understanding.

arXiv 2307.07421, Interspeech 2024; for streams arXiv 2409.07165.

Every self-attention of a speech encoder becomes a mean: each frame is merged with the average over
the utterance of what all frames have to say. The cost is linear in time. No frame is compared with
another, so the block needs local mixing too, which a Conformer's convolution is.

Implemented from the papers; no code taken. Departures, besides those of the mixer
(`pared.nn.summary_mixing`): the mean and the convolutions of the block leave padding out, also
under a chunk mask; `lite`, which says the same to all frames, always gets the gating convolution of
a Branchformer beside it, merged with it as there, whose two branches share the norm in front of
them. Positions: what a Conformer's attentions get of them goes with the attentions, and fixed
sinusoids are added once in front of the blocks, where no attention is left, a rotary one included;
the convolution of wav2vec 2.0 and the table of Whisper stay. Chosen here: 8 heads in `full`, as in
the paper's Conformers, 1 in `lite`, as in its Branchformers; dropout 0.1, the later code's; a
Branchformer's gate starts at one, and merges by linear maps with a GELU behind each. With
`streaming` the convolutions become Dynamic Chunk Convolutions. All weights of the mixer are new: it
is for training, from scratch or from a pretrained encoder. Whisper has no padding mask, so that its
mean includes the silence behind the speech. WavLM isn't served: its first attention makes a bias of
positions that all later ones get handed on, so they can't be replaced one by one. Measured here:
the sinusoids hold a Conformer of a million parameters back for a good part of a short training,
which `positions=none` spares it; the default is the paper's all the same. The claim of errors below
is measured without them, and both are in the table of recognisers. It differs, since the paper's
premise, maps of attention that are close to a mean, fails in the later blocks of so small a model:
there frames attend to a third of the others, and each to different ones. In the first half of the
blocks alone (`layers`) the mean costs few errors. Neither the width of convolutions nor the reach
of the mean closes the gap, and attention without positions hardly has it; so what is missed is that
frames are compared. One seed each, the first of that table; a mean's shares in the table of maps
would be 1 and 0. Not verified: error rates at the paper's scale.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family, Site
from pared.anatomy.speech import SpeechEncoder
from pared.errors import InputError
from pared.info import Headline, Info
from pared.method import Claim
from pared.nn.rotary import rotary_of
from pared.nn.summary_mixing import Mode, Summary, network
from pared.nn.summary_mixing import SummaryMixing as Mixer
from pared.speech.encoder_conversion import EncoderConversion
from pared.speech.hearing import FrameConvolution, Hearing, hearing_of

INFO = Info(
    slug="summarymixing-asr",
    title="SummaryMixing: A Linear-Complexity Alternative to Self-Attention for Speech Recognition "
    "and Understanding",
    arxiv="2307.07421",
    venue="Interspeech 2024",
    kind="conversion",
    families=("conformer", "wav2vec2", "whisper"),
    training=True,
    trained_by="recipe",
    exact=False,
    maturity="faithful",
    summary="each frame merged with a mean over the utterance, in the place of self-attention",
    cls="SummaryMixing",
    headlines=(
        Headline(
            key="errors-over-attention",
            text="word error rate of a Conformer, SummaryMixing over self-attention "
            "(paper: 2.1 / 2.3 on LibriSpeech test-clean)",
            paper=0.913,
            direction="lower",
            bound=1.1,
        ),
        Headline(
            key="training-time",
            text="time of a training step of a Conformer, self-attention over SummaryMixing "
            "(paper: 137 / 98 GPU hours)",
            paper=1.40,
            direction="higher",
            bound=1.1,
        ),
        Headline(
            key="training-memory",
            text="peak memory of a training step of a Conformer, self-attention over SummaryMixing "
            "(paper: 46 / 21 GB)",
            paper=2.19,
            direction="higher",
            bound=1.1,
        ),
    ),
)


class SummaryMixing(EncoderConversion):
    """h_t = c([LN(v_t f(x_t)) ; LN(s_bar)]), section 2 of the paper."""

    info = INFO

    mode: Mode = Field(
        default="full",
        description="full; lite, where all frames get the mean as it is, beside a gating "
        "convolution; fast, the streaming paper's, with one linear map for both networks; "
        "expdecay, where frames further away count less, quadratic in time",
    )
    heads: int | None = Field(
        default=None,
        ge=1,
        description="n, blocks of the block-diagonal linear maps; must divide all widths; None "
        "means 8, 1 in lite, and none in fast",
    )
    window: int | None = Field(
        default=None,
        ge=0,
        description="frames on either side that a frame's mean reaches; None means the whole "
        "utterance; quadratic in time, not for streams",
    )
    hidden: int | None = Field(
        default=None,
        ge=1,
        description="channels between the two layers of either network; None means the encoder's "
        "width, here and below",
    )
    local: int | None = Field(default=None, ge=1, description="L, channels of the local network")
    summary: int | None = Field(default=None, ge=1, description="S, channels of the mean")
    layer_norm: bool | None = Field(
        default=None,
        description="normalise local network and mean; None means yes in full and expdecay, which "
        "alone can",
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="rate on what is merged")
    positions: Literal["sinusoids", "none"] = Field(
        default="sinusoids",
        description="that a Conformer gets in the place of its attentions' own, once it has none "
        "left; of several conversions the last one's count",
    )
    branch: bool | None = Field(
        default=None,
        description="a gating convolution beside the mixer, as in a Branchformer; None means in "
        "lite only",
    )
    gate: int | None = Field(
        default=None,
        ge=2,
        description="channels of the gating convolution, half of them gates; even; None means six "
        "times the width",
    )
    kernel: int = Field(default=31, ge=3, description="frames that a gate hears; odd")

    @model_validator(mode="after")
    def _fits_together(self) -> "SummaryMixing":
        if self.kernel % 2 == 0 or (self.gate or 2) % 2:
            raise ValueError(
                f"kernel={self.kernel} must be odd and gate={self.gate} even; the defaults are 31 "
                "and six times the width"
            )
        if self.mode == "lite" and self.branch is False:
            raise ValueError(
                "mode=lite gives all frames the same, which needs a branch beside it; leave branch "
                "out, or use full"
            )
        if self.window is not None and self.streaming:
            raise ValueError(
                f"window={self.window} reaches frames that a stream hasn't heard; leave window "
                "out, or streaming"
            )
        unused = {
            "lite": ("local", "layer_norm", "window"),
            "fast": ("heads", "hidden", "layer_norm"),
        }
        for name in unused.get(self.mode, ()):
            if getattr(self, name) is not None:
                raise ValueError(f"mode={self.mode} has no {name}; leave {name} out, or use full")
        return self

    @property
    def blocks(self) -> int:
        """Blocks of the mixer's linear maps."""
        return self.heads or (8 if self.mode in ("full", "expdecay") else 1)

    @property
    def branched(self) -> bool:
        """Whether a gating convolution stands beside the mixer."""
        return self.mode == "lite" if self.branch is None else self.branch

    def claims(self, family: Family) -> list[Claim]:
        sizes = {family.width, *filter(None, (self.hidden, self.local, self.summary))}
        if bad := [size for size in sorted(sizes) if size % self.blocks]:
            raise InputError(
                f"{self.info.slug}: heads={self.blocks} doesn't divide the width {bad[0]} of the "
                "mixer."
            )
        return super().claims(family)

    def attention(self, family: SpeechEncoder, site: Site, hearing: Hearing) -> nn.Module:
        width = family.width
        mixer = Mixer(
            width,
            self.mode,
            self.blocks,
            self.hidden,
            self.local,
            self.summary,
            output=width,
            layer_norm=self.layer_norm,
            dropout=self.dropout,
        )
        branch = None
        if self.branched:
            says = (self.summary or width) if self.mode == "lite" else width
            branch = Branchformer(self, width, says, hearing, f"{site.path}.branch")
        return FrameMixer(mixer, branch, hearing, site.path, self.window)

    def drops_positions(self, family: SpeechEncoder) -> bool:
        return family.positions_by == "attention"

    def convert(self, model: nn.Module) -> None:
        super().convert(model)
        family: Any = anatomy.of(model)
        layers = [site.module for site in family.sites("self_attention")]
        bare = self.drops_positions(family) and all(isinstance(x, FrameMixer) for x in layers)
        if bare and self.positions == "sinusoids":
            family.add_positions(Sinusoids(hearing_of(model)))


class FrameMixer(nn.Module):
    """SummaryMixing where a self-attention was, in the form that transformers' layers call.

    Args:
        mixer: which mixes.
        branch: which mixes nearby frames and merges both, or None.
        hearing: of the model.
        path: under which it keeps what it remembers.
        window: frames on either side that a frame hears; None: all.
    """

    def __init__(
        self,
        mixer: Mixer,
        branch: nn.Module | None,
        hearing: Hearing,
        path: str,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.mixer, self.branch = mixer, branch
        self.hearing, self.path, self.window = hearing, path, window

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Mixed frames, (batch, frames, width) in and out, and no attention map."""
        x, hearing = hidden_states, self.hearing
        if hearing.kept is None:
            y = self.mixer(x, hearing.valid, self.visible(x))
        else:
            y = self._streamed(x, hearing.kept)
        return (y if self.branch is None else self.branch(x, y)), None

    def visible(self, x: Tensor) -> Tensor | None:
        """Which frame (row) hears which, (frames, frames): its chunks', and within the window."""
        chunked = self.hearing.visible(x)
        if self.window is None:
            return chunked
        frames = torch.arange(x.shape[1], device=x.device)
        near = (frames[:, None] - frames).abs() <= self.window
        return near if chunked is None else near & chunked

    def _streamed(self, x: Tensor, kept: dict) -> Tensor:
        """The next chunk of a stream, and what is kept: a sum and a number for the chunks heard.

        One for all of them where nothing limits the past, else one for each.
        """
        if self.window is not None:
            raise InputError(
                f"window={self.window} reaches frames that a stream hasn't heard; convert without "
                "it for streams."
            )
        before: tuple[Summary, ...] = kept.get(self.path, ())
        past = _together(before) if before else None
        y, heard = self.mixer.stream(x, past, self.hearing.valid)
        if self.hearing.left is None:
            kept[self.path] = (heard,)
        else:
            own = (
                heard
                if past is None
                else Summary(*(a - b for a, b in zip(heard, past, strict=True)))
            )
            kept[self.path] = self.hearing.kept_chunks((*before, own))
        return y


def _together(chunks: tuple[Summary, ...]) -> Summary:
    return Summary(sum(c.total for c in chunks), sum(c.frames for c in chunks))


class Branchformer(nn.Module):
    """merge([drop y ; drop cgMLP(x)]): a mixer's y beside a gating convolution (arXiv 2207.02971).

    cgMLP(x) = W_2 (u * conv(LN w)), [u ; w] = GELU(W_1 x).

    Args:
        settings: sizes and rates.
        width: of the frames.
        says: channels of y.
        hearing: of the model.
        path: under which the convolution keeps what it remembers.
    """

    def __init__(
        self, settings: SummaryMixing, width: int, says: int, hearing: Hearing, path: str
    ) -> None:
        super().__init__()
        half = (settings.gate or 6 * width) // 2
        near = nn.Conv1d(half, half, settings.kernel, groups=half)
        nn.init.normal_(near.weight, std=1e-6)
        nn.init.ones_(near.bias)
        self.enter, self.leave = nn.Linear(width, 2 * half), nn.Linear(half, width)
        self.norm = nn.LayerNorm(half)
        self.near = FrameConvolution(near, hearing, f"{path}.near")
        self.drop = nn.Dropout(settings.dropout)
        self.merge = network(says + width, settings.hidden or width, width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (batch, frames, width) and y (batch, frames, says) to (batch, frames, width)."""
        u, w = F.gelu(self.enter(x)).chunk(2, dim=-1)
        gates = self.near(self.norm(w).transpose(1, 2)).transpose(1, 2)
        nearby = self.leave(u * gates)
        return self.merge(torch.cat([self.drop(y), self.drop(nearby)], dim=-1))


class Sinusoids(nn.Module):
    """x_t + p_t with p_t = (sin t theta_0, cos t theta_0, sin t theta_1, ...), theta_c as in RoPE.

    Args:
        hearing: of the model, which knows where in a stream a call begins.
    """

    def __init__(self, hearing: Hearing) -> None:
        super().__init__()
        self.hearing = hearing

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, width) in and out."""
        precise = torch.promote_types(x.dtype, torch.float32)
        frames = torch.arange(x.shape[1], dtype=precise, device=x.device) + self.hearing.seen
        cos, sin = rotary_of(frames, x.shape[-1])
        even = torch.arange(x.shape[-1], device=x.device) % 2 == 0
        return x + torch.where(even, sin, cos).to(x.dtype)
