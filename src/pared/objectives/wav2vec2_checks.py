"""What must hold of wav2vec 2.0's pre-training without trained weights.

Run by `pared check summarymixing-ssl`.
"""

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pared.anatomy import presets
from pared.method import convert, parse
from pared.objectives.wav2vec2 import (
    Wav2Vec2Pretraining,
    codes_in_use,
    contrastive_logits,
    contrastive_logits_reference,
    contrastive_loss,
    diversity_loss,
    negatives,
    span_mask,
)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def toy(*methods: str, **config: Any) -> nn.Module:
    """A Conformer for pre-training at toy size, converted, in training mode."""
    settings = presets.get("toy:conformer").main.config | {
        "mask_time_prob": 0.5,
        "num_codevectors_per_group": 32,
        "codevector_dim": 16,
        "proj_codevector_dim": 16,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls: Any = transformers.Wav2Vec2ConformerForPreTraining
        model = cls(cls.config_class(**(settings | config)))
        return convert(model, *map(parse, methods)).train()


def sounds(batch: int = 3, samples: int = 16_000) -> dict[str, Tensor]:
    """A batch of noise; every second utterance is padded by a quarter."""
    lengths = torch.full((batch,), samples)
    lengths[1::2] = samples * 3 // 4
    mask = (torch.arange(samples) < lengths[:, None]).long()
    noise = torch.randn(batch, samples, generator=seeded()) * mask
    return {"input_values": noise, "input_lengths": lengths, "attention_mask": mask}


def check_masks() -> None:
    """Every utterance hides as many frames, a multiple of the span, and none of its padding."""
    for seed in range(20):
        lengths = torch.tensor([120, 47, 80, 12 + seed])
        mask = span_mask(lengths, 130, 0.65, 10, seeded(seed))
        counts = mask.sum(dim=1)
        assert (counts == counts[0]).all() and counts[0] % 10 == 0, f"hidden: {counts.tolist()}"
        assert counts[0] <= lengths.min(), "more is hidden than there is"
        padding = torch.arange(130) >= lengths[:, None]
        assert not (mask & padding).any(), "padding is hidden"


def check_negatives() -> None:
    """Negatives are all other masked frames alike, and never the frame itself."""
    drawn = negatives(2, 5, 4000, seeded())
    own = torch.arange(5)[:, None]
    assert not (drawn == own).any(), "a frame is its own negative"
    share = torch.nn.functional.one_hot(drawn, 5).float().mean(dim=2)
    wanted = (1 - torch.eye(5)) / 4
    # Four standard deviations of a share of 1/4 among 4000.
    torch.testing.assert_close(share, wanted.expand(2, -1, -1), rtol=0, atol=0.028)


def check_reference() -> None:
    """Logits equal those taken pair by pair within 1e-5; equal targets count as none."""
    c, q = torch.randn(2, 2, 6, 8, generator=seeded())
    q[0, 3] = q[0, 1]
    others = negatives(2, 6, 7, seeded(1))
    found, wanted = (
        function(c, q, others, 0.1)
        for function in (contrastive_logits, contrastive_logits_reference)
    )
    assert found.isinf().any(), "a negative equal to the truth isn't left out"
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def check_perfect_context() -> None:
    """Where the context equals the target, the truth always wins."""
    q = torch.randn(2, 40, 16, generator=seeded())
    logits = contrastive_logits(q, q, negatives(2, 40, 100, seeded()))
    assert (logits.argmax(dim=-1) == 0).all(), "another frame is nearer than the same one"


def check_chance() -> None:
    """With K = 100 a fresh model's loss is within 0.5 of ln(101), and its accuracy by chance."""
    objective, batch = Wav2Vec2Pretraining(), sounds(4, 48_000)
    for methods in ((), ("summarymixing-asr",)):
        # Codes enough that few frames share one.
        model = toy(*methods, num_codevectors_per_group=320, codevector_dim=32)
        scores = objective.scores(model, batch, seeded())
        loss, accuracy = float(scores.loss), float(scores.accuracy)
        assert abs(loss - math.log(101)) < 0.5, f"the loss is {loss:.2f}, by chance 4.62"
        assert accuracy < 0.05, f"the accuracy is {accuracy:.3f}, by chance 0.01"


def check_diversity() -> None:
    """0 where all codes are used alike; (G V - G) / G V where each codebook uses one."""
    even, one = torch.zeros(2, 50, 2, 320)
    one[..., 7] = 1000
    for given, wanted in ((even, 0.0), (one, 638 / 640)):
        found = diversity_loss(codes_in_use(given), 640)
        # 1e-7 beside 320 probabilities of 1/320 is 3e-5 of the perplexity.
        assert abs(float(found) - wanted) < 5e-5, f"it is {float(found):.6f}, not {wanted}"


def check_gradients() -> None:
    """Gradients reach all of a converted model but its wide convolution, which it never calls."""
    model = toy("summarymixing-asr")
    terms = Wav2Vec2Pretraining()(model, sounds(), seeded())
    assert terms.keys() == {"contrastive", "diversity"}
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        if "pos_conv_embed" not in name:
            assert parameter.grad is not None and parameter.grad.any(), f"none reaches {name}"


def check_stock_loss() -> None:
    """Times the number of masked frames it is the loss that the model itself computes."""
    model = toy().eval()
    objective, batch = Wav2Vec2Pretraining(), sounds()
    with torch.no_grad():
        terms = objective(model, batch, seeded(5))
    generator = seeded(5)
    frames = model._get_feat_extract_output_lengths(batch["input_lengths"])
    most = int(frames.max())
    mask = span_mask(frames, most, 0.65, 10, generator)
    others = negatives(3, int(mask[0].sum()), 100, generator)
    # Among all frames of the batch, as the model wants them.
    places = mask.nonzero()[:, 1].view(3, -1)
    chosen = torch.zeros(3, most, 100, dtype=torch.long)
    absolute = places.gather(1, others.flatten(1)) + most * torch.arange(3)[:, None]
    chosen[mask] = absolute.view(-1, 100)
    with torch.no_grad():
        own = model(
            batch["input_values"],
            attention_mask=batch["attention_mask"],
            mask_time_indices=mask,
            sampled_negative_indices=chosen,
        )
    torch.testing.assert_close(mask.sum() * sum(terms.values()), own.loss, rtol=1e-4, atol=1e-3)


def check_truth_is_first() -> None:
    """The loss is that of the first class."""
    logits = torch.randn(3, 5, 11, generator=seeded())
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(15).long())
    torch.testing.assert_close(contrastive_loss(logits), wanted)
