"""Streaming PSE: Real-Time Personalised Speech Enhancement Transformers with Dynamic Cross-attended
Speaker Representations.

arXiv 2211.04346, INTERSPEECH 2023.

Of a noisy recording only the enrolled user's voice is kept, while it is being recorded. In the
place of one fixed vector for the user, every frame of a causal Transformer attends to the whole
enrolment, so that the representation of the user follows what is being heard. Keys and values of
the enrolment are computed once; a frame costs the same after an hour as at the start.

Implemented from the abstracts, which is all that could be had: there is no code. They state the
task, the streaming Transformer, and attention to the whole enrolment for every frame.

Left open by the abstracts and chosen here, which is everything else: windows of 32 ms (square root
of Hann) every 16 ms; magnitudes to the power 0.3 as features, of the noisy side without any
normalisation, of the enrolment scaled to a fixed level; pre-norm layers with rotary positions,
which hear the last 128 frames, their own among them; cross-attention behind the self-attention of
every layer, with a norm of its own, without positions, and with values that start at the length of
what they come from; two layers for the enrolment, with rotary positions, whose pauses (40 dB below
the loudest frame) are masked and of which 10 s count; a mask of the magnitudes with the noisy
phase. Look-ahead delays the mask: that of frame t is read where frame t + A has been heard. The
baselines use the same fusion with another S: the mean of the encoded enrolment, an embedding made
elsewhere through a linear layer, or zero. The loss is that of `pared.objectives.enhancement`, to
which all recipes but the full-size one add a term that tells voices apart.

Measured here: attention gains nothing over the mean of the same encoder, in a model of its size or
of half of it. What it learns is hardly a moving representation: it listens to a part of the
enrolment, but to much the same part whatever is being heard, and told the same in all frames of a
clip it loses a seventh of a dB at most. Long enrolments in which no two sentences have the same
pitch, or an encoder that hears single frames, don't turn that round, and with three times the steps
the mean leads by more (one seed each, see the table of gains). In the table of attention a mean's
shares would be 1 and 0.

Not verified: quality on real voices and at the paper's scale, which it doesn't tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pared.info import Headline, Info
from pared.method import Model

if TYPE_CHECKING:
    from pared.speech.streaming_pse.model import StreamingPSEModel

INFO = Info(
    slug="streaming-pse",
    title="Real-Time Personalised Speech Enhancement Transformers with Dynamic Cross-attended "
    "Speaker Representations",
    arxiv="2211.04346",
    venue="INTERSPEECH 2023",
    kind="model",
    families=(),
    training=True,
    exact=False,
    maturity="faithful",
    summary="only the enrolled voice passes: every frame attends to the whole enrolment",
    cls="StreamingPSE",
    headlines=(
        Headline(
            key="real-time-factor",
            text="time of one hop on one CPU thread over the 16 ms that it lasts, default size "
            "(paper: real time)",
            paper=1.0,
            direction="lower",
            bound=1.0,
        ),
        Headline(
            key="cross-over-static",
            text="SI-SDR improvement in dB, attention to the enrolment minus its mean vector "
            "(paper: better, no number known)",
            paper=0.0,
            direction="higher",
            bound=0.0,
        ),
        Headline(
            key="half-size-over-static",
            text="SI-SDR improvement in dB, attention to the enrolment minus a mean vector in a "
            "model twice the size (paper: better, no number known)",
            paper=0.0,
            direction="higher",
            bound=0.0,
        ),
        Headline(
            key="half-size-over-vector",
            text="SI-SDR improvement in dB, attention to the enrolment in that model of half the "
            "size minus an embedding of another encoder (paper: better, no number known)",
            paper=0.0,
            direction="higher",
            bound=0.0,
        ),
        Headline(
            key="flips",
            text="share of mixtures of two equally loud talkers in which the enrolment decides who "
            "is kept, whichever of them is enrolled (paper: no number known; 0.9 is what is asked)",
            paper=0.9,
            direction="higher",
            bound=0.9,
        ),
    ),
)

# Samples per second of everything that goes in and comes out.
SAMPLE_RATE = 16_000


class StreamingPSE(Model):
    """The enhancer's shape. `build` makes the model, which carries these settings."""

    info = INFO

    width: int = Field(default=256, ge=2, description="d, channels of every layer")
    layers: int = Field(default=4, ge=1, description="N, layers of the noisy side")
    heads: int = Field(default=4, ge=1, description="heads of every attention; divide the width")
    expansion: int = Field(default=4, ge=1, description="hidden width of a feed-forward over d")
    left_context: int = Field(
        default=128, ge=1, description="L_c, frames that a layer hears, the newest among them"
    )
    lookahead: int = Field(
        default=0, ge=0, le=3, description="A, frames heard before a mask is given; 16 ms each"
    )
    conditioning: Literal["cross", "static_mean", "static_vector", "none"] = Field(
        default="cross", description="what the layers are told of the user (S)"
    )
    fusion: Literal["concat", "add", "film"] = Field(
        default="concat", description="how S joins the frames"
    )
    conditioned: Literal["all", "first"] = Field(default="all", description="C, layers told of S")
    enrolment_encoder: Literal["transformer", "frames"] = Field(
        default="transformer", description="frames: each frame by itself, in any order"
    )
    enrolment_layers: int = Field(default=2, ge=0, description="N_e, layers of the enrolment")
    enrolment_seconds: float = Field(default=10.0, ge=1, description="of enrolment that count")
    vector_width: int = Field(
        default=512, ge=1, description="width of the embedding given to static_vector"
    )
    mask: Literal["magnitude", "complex"] = Field(
        default="magnitude", description="what a frame's spectrum is multiplied with"
    )
    window: int = Field(default=512, ge=4, description="samples of a frame; it moves by half")
    compression: float = Field(default=0.3, gt=0, le=1, description="power of the features")

    @model_validator(mode="after")
    def _even(self) -> StreamingPSE:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width={self.width} doesn't split into {self.heads} heads of pairs of channels; "
                f"choose a multiple of {2 * self.heads}"
            )
        if self.window % 2:
            raise ValueError(f"window={self.window} can't move by half; choose an even number")
        return self

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return self.window // 2

    @property
    def bins(self) -> int:
        """F, frequencies of a frame."""
        return self.window // 2 + 1

    @property
    def conditioned_layers(self) -> int:
        """How many layers are told of S."""
        return self.layers if self.conditioned == "all" else 1

    @property
    def latency(self) -> float:
        """Algorithmic latency in seconds: from a sound to its last sample that is given out."""
        return (self.window + self.lookahead * self.hop) / SAMPLE_RATE

    def build(self) -> StreamingPSEModel:
        from pared.speech.streaming_pse.model import StreamingPSEConfig, StreamingPSEModel

        return StreamingPSEModel(StreamingPSEConfig(**self.model_dump(mode="json"))).eval()
