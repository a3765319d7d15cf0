"""Linear-Complexity Self-Supervised Learning for Speech Processing.

arXiv 2407.13377, Interspeech 2024; the task is that of wav2vec 2.0 (arXiv 2006.11477).

A speech encoder learns from recordings alone. Spans of its input frames are hidden behind one
learned vector, and from what it makes of a hidden frame the true one must be told from others of
the same utterance, all of them seen through a quantiser with two small codebooks. The paper does
the whole of this with SummaryMixing in the place of every self-attention, at a cost linear in time;
here that is the conversion `summarymixing-asr`, and the objective trains any encoder, converted or
not.

    L = -log(exp(cos(c, q) / kappa) / sum_k exp(cos(c, q_k) / kappa)) + alpha L_div
    L_div = (G V - sum_g exp(H(p_g))) / G V

Implemented from the paper, on transformers' stock classes; no code taken. G, V, K, kappa and alpha
are the model's own (`num_codevector_groups`, `num_codevectors_per_group`, `num_negatives`,
`contrastive_logits_temperature`, `diversity_loss_weight`). Departures: the loss is a mean over
masked frames where the paper sums over them, so that its size says how well the encoder does,
whatever the batch; a gradient clipped at 100 there is clipped at 100 over their number here.
Negatives come from the utterance itself, which an offset in the paper's code misses. All products
of masked frames are taken at once, so that negatives need not be copied K times. Masks and
negatives are drawn by the step's own generator. H takes log(p + 1e-7), since the model's own has no
derivative once a code is so unlikely that its p is 0. transformers' Conformer keeps its batch norm
and its convolutions without biases. The mask vector takes part in the mean of SummaryMixing, as in
the paper. Not verified: downstream results at the paper's scale.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.anatomy import unwrap
from pared.errors import InputError
from pared.info import Headline, Info
from pared.nn.linear_attention import full_precision
from pared.objectives.ctc import frame_lengths

INFO = Info(
    slug="summarymixing-ssl",
    title="Linear-Complexity Self-Supervised Learning for Speech Processing",
    arxiv="2407.13377",
    venue="Interspeech 2024",
    kind="objective",
    families=("conformer", "wav2vec2"),
    training=True,
    exact=False,
    maturity="faithful",
    summary="encoders learn from recordings alone, by telling hidden frames apart",
    cls="Wav2Vec2Pretraining",
    headlines=(
        Headline(
            key="pretraining-time",
            text="time of a pre-training step of a Conformer, self-attention over SummaryMixing "
            "(paper: 18 % less)",
            paper=1.22,
            direction="higher",
            bound=1.05,
        ),
        Headline(
            key="pretraining-memory",
            text="peak memory of a pre-training step of a Conformer, self-attention over "
            "SummaryMixing (paper: 23 % less)",
            paper=1.30,
            direction="higher",
            bound=1.1,
        ),
        Headline(
            key="probe-errors",
            text="word error rate of a two-layer LSTM probe on the frozen encoder, SummaryMixing "
            "over self-attention (paper: equal or better, no single number)",
            paper=1.0,
            direction="lower",
            bound=1.1,
        ),
        Headline(
            key="probe-voices",
            text="share of voices that a linear probe on the frozen encoder names rightly, "
            "SummaryMixing less self-attention (paper: equal or better, of verification)",
            paper=0.0,
            direction="higher",
            bound=-0.05,
        ),
        Headline(
            key="probe-intents",
            text="share of intents that a two-layer LSTM probe on the frozen encoder names "
            "rightly, SummaryMixing less self-attention (paper: equal or better)",
            paper=0.0,
            direction="higher",
            bound=-0.05,
        ),
        Headline(
            key="parameters",
            text="parameters in millions of the paper's encoder with its quantiser, as built of "
            "transformers' parts",
            paper=154.8,
            direction="lower",
            bound=155.0,
        ),
    ),
)


class Scores(NamedTuple):
    """How well hidden frames are told from others.

    Attributes:
        loss: mean of the contrastive loss over masked frames, in nats; ln(K + 1) by chance.
        accuracy: share of masked frames whose own target is nearest.
        perplexity: sum over the codebooks of exp(entropy): codes in use, G V at most.
    """

    loss: Tensor
    accuracy: Tensor
    perplexity: Tensor


class Wav2Vec2Pretraining(nn.Module):
    """Contrastive and diversity loss of masked frames.

    Batch: `input_values` (batch, samples), padded at the end; `input_lengths` (batch,) without the
    padding; `attention_mask` (batch, samples), 1 where there is none. Model: a transformers
    `Wav2Vec2ForPreTraining` or `Wav2Vec2ConformerForPreTraining`, converted or not.

    Args:
        probability: share of the frames of the shortest utterance that spans would cover if they
            didn't overlap.
        span: frames of a masked span.
        hottest: temperature of the Gumbel softmax at first.
        coolest: its least.
        cooling: factor by which it falls at every step.
    """

    info = INFO

    def __init__(
        self,
        probability: float = 0.65,
        span: int = 10,
        hottest: float = 2.0,
        coolest: float = 0.25,
        cooling: float = 0.999995,
    ) -> None:
        super().__init__()
        if not (0 < probability <= 1 and span >= 2):
            raise InputError(
                f"masks of probability={probability} and span={span} can't be; give a share above "
                "0 and 2 frames at least."
            )
        self.probability, self.span = probability, span
        self.hottest, self.coolest, self.cooling = hottest, coolest, cooling
        self._temperature = hottest

    def at_step(self, step: int) -> None:
        """Cool down: max(hottest cooling^step, coolest) in step `step`, counted from 0."""
        self._temperature = max(self.hottest * self.cooling**step, self.coolest)

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        logits, perplexity = self.compared(model, batch, generator)
        config = unwrap(model).config
        codes = config.num_codevector_groups * config.num_codevectors_per_group
        return {
            "contrastive": contrastive_loss(logits),
            "diversity": config.diversity_loss_weight * diversity_loss(perplexity, codes),
        }

    @torch.no_grad()
    def scores(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> Scores:
        """How well `model`, as it is, tells the masked frames of a batch apart."""
        logits, perplexity = self.compared(model, batch, generator)
        right = (logits.argmax(dim=-1) == 0).float().mean()
        return Scores(contrastive_loss(logits), right, perplexity)

    def compared(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Logits of masked frames, (batch, masked, 1 + K), the truth first; codes in use.

        Raises:
            InputError: the model is no pre-training class or can't mask; or an utterance is shorter
                than a span.
        """
        inner: Any = unwrap(model)
        _check(inner)
        inner.set_gumbel_temperature(self._temperature)
        sounds = batch["input_values"]
        most = int(frame_lengths(inner, torch.tensor([sounds.shape[1]])))
        lengths = frame_lengths(inner, batch["input_lengths"].cpu()).clamp(max=most)
        mask = span_mask(lengths, most, self.probability, self.span, generator).to(sounds.device)
        found, chosen = _run(model, sounds, batch.get("attention_mask"), mask)
        c, q = (
            frames[mask].unflatten(0, (len(mask), -1)).float()  # every row has as many
            for frames in (found.projected_states, found.projected_quantized_states)
        )
        count = inner.config.num_negatives
        others = negatives(c.shape[0], c.shape[1], count, generator).to(c.device)
        kappa = inner.config.contrastive_logits_temperature
        groups = inner.config.num_codevector_groups
        choices = chosen[mask].unflatten(-1, (groups, -1))
        used = codes_in_use(choices, soft=inner.quantizer.training)
        return contrastive_logits(c, q, others, kappa), used


def _run(
    model: nn.Module, sounds: Tensor, valid: Tensor | None, mask: Tensor
) -> tuple[Any, Tensor]:
    """What a model makes of sounds, and the logits by which its quantiser chooses codes.

    Returns:
        The model's output, and (batch, frames, G V).
    """
    inner: Any = unwrap(model)
    chosen: list[Tensor] = []
    hook = inner.quantizer.weight_proj.register_forward_hook(
        lambda module, args, logits: chosen.append(logits)
    )
    try:
        found = model(sounds, attention_mask=valid, mask_time_indices=mask)
    finally:
        hook.remove()
    return found, chosen[0]


def _check(model: Any) -> None:
    if not hasattr(model, "set_gumbel_temperature"):
        raise InputError(
            f"{type(model).__name__} has no quantiser to pre-train with; give a class such as "
            "transformers.Wav2Vec2ConformerForPreTraining."
        )
    base = getattr(model, model.base_model_prefix)
    if not hasattr(base, "masked_spec_embed") or not model.config.apply_spec_augment:
        raise InputError(
            f"this {type(model).__name__} has no vector for masked frames; configure it with "
            "mask_time_prob above 0 and apply_spec_augment on."
        )


# Masks --------------------------------------------------------------------------------------------


def span_mask(
    lengths: Tensor, most: int, probability: float, span: int, generator: torch.Generator
) -> Tensor:
    """Which frames are hidden: as many of every utterance, in spans that may overlap.

    int(probability T_min / span + U[0, 1) + 1) spans of each, T_min the shortest utterance's
    frames, but no more than fit into these; no two with the same start. Single frames make up for
    what overlaps.

    Args:
        lengths: frames of each utterance, without padding, (batch,).
        most: frames of the longest, padding included.
        probability: see above.
        span: frames of a span.
        generator: of random numbers (CPU).

    Returns:
        bool (batch, most), on the CPU.

    Raises:
        InputError: an utterance is shorter than a span.
    """
    shortest = int(lengths.min())
    if shortest < span:
        raise InputError(
            f"an utterance has {shortest} frames, and masks hide {span} in a row; leave such short "
            "ones out."
        )
    wanted = probability * shortest / span + float(torch.rand((), generator=generator)) + 1
    spans = min(int(wanted), shortest // span)
    mask = torch.zeros(len(lengths), most, dtype=torch.bool)
    for row, length in zip(mask, lengths.tolist(), strict=True):
        starts = torch.randperm(length - span + 1, generator=generator)[:spans]
        row[(starts[:, None] + torch.arange(span)).flatten()] = True
        seen = (~row[:length]).nonzero().flatten()
        missing = spans * span - int(row.sum())
        row[seen[torch.randperm(len(seen), generator=generator)[:missing]]] = True
    return mask


def negatives(batch: int, masked: int, count: int, generator: torch.Generator) -> Tensor:
    """Numbers of other masked frames of the same utterance, uniformly drawn.

    Args:
        batch: utterances.
        masked: frames of each, 2 at least.
        count: K.
        generator: of random numbers (CPU).

    Returns:
        int64 (batch, masked, count), never a frame's own number.
    """
    drawn = torch.randint(masked - 1, (batch, masked, count), generator=generator)
    return drawn + (drawn >= torch.arange(masked)[:, None])


# Losses -------------------------------------------------------------------------------------------


def contrastive_logits(c: Tensor, q: Tensor, others: Tensor, kappa: float = 0.1) -> Tensor:
    """cos(c_t, q_n) / kappa of the truth n = t and of the negatives.

    Args:
        c: what the encoder makes of masked frames, float32 (batch, masked, channels).
        q: their targets, likewise.
        others: n of the negatives, see `negatives`.
        kappa: the temperature.

    Returns:
        (batch, masked, 1 + K), the truth first; -inf where a negative is the same as the truth.
    """
    with full_precision(c):
        cosines = F.normalize(c, dim=-1) @ F.normalize(q, dim=-1).transpose(1, 2)
    own = torch.arange(c.shape[1], device=c.device).expand(c.shape[:2]).unsqueeze(-1)
    logits = cosines.gather(2, torch.cat([own, others], dim=2)) / kappa
    # Equal targets get equal numbers: comparing the targets themselves would take K copies.
    number = q.detach().flatten(0, 1).unique(dim=0, return_inverse=True)[1].view(q.shape[:2])
    same = number.gather(1, others.flatten(1)).view_as(others) == number.unsqueeze(-1)
    return torch.cat([logits[..., :1], logits[..., 1:].masked_fill(same, -torch.inf)], dim=-1)


def contrastive_logits_reference(c: Tensor, q: Tensor, others: Tensor, kappa: float) -> Tensor:
    """The same frame by frame and pair by pair. For tests."""
    rows = []
    for b, t in torch.cartesian_prod(*map(torch.arange, c.shape[:2])).tolist():
        row = [torch.cosine_similarity(c[b, t], q[b, t], dim=0)]
        for n in others[b, t].tolist():
            cosine = torch.cosine_similarity(c[b, t], q[b, n], dim=0)
            row.append(cosine if (q[b, n] != q[b, t]).any() else cosine.new_tensor(-torch.inf))
        rows.append(torch.stack(row) / kappa)
    return torch.stack(rows).view(*others.shape[:2], -1)


def contrastive_loss(logits: Tensor) -> Tensor:
    """Mean over frames of -log softmax of the truth, the first of (..., 1 + K)."""
    return -logits.log_softmax(dim=-1)[..., 0].mean()


def codes_in_use(logits: Tensor, soft: bool = True) -> Tensor:
    """sum_g exp(H(p_g)), the perplexity, p_g the mean over frames of what group g chooses.

    Args:
        logits: of masked frames, (frames, G, V).
        soft: count chances, as in training; else the best code of every frame alone.
    """
    logits = logits.float()
    chances = logits.softmax(-1) if soft else F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    p = chances.mean(dim=0)
    return (-(p * (p + 1e-7).log()).sum(dim=-1)).exp().sum()


def diversity_loss(perplexity: Tensor, codes: int) -> Tensor:
    """(G V - sum_g exp(H(p_g))) / G V: 0 where all codes are used alike.

    Args:
        perplexity: the sum.
        codes: G V.
    """
    return (codes - perplexity) / codes
