"""What must hold of SummaryMixing in speech encoders without trained weights.

Run by `pared check summarymixing-asr`.
"""

from typing import Any

import torch
from torch import nn

from pared import anatomy
from pared.anatomy import presets
from pared.method import convert
from pared.nn.summary_mixing import summary_mixing_reference
from pared.speech.hearing import EncoderStream, set_chunks
from pared.speech.summary_mixing import SummaryMixing
from pared.speech.toys import encoded, encoder_of, frames, toy

# What can work on a stream; the weights of expdecay reach over all frames.
MODES = ("full", "lite", "fast")


def converted(settings: SummaryMixing, name: str = "toy:conformer", **config: Any) -> nn.Module:
    """A toy recogniser, converted."""
    return toy(name, settings, **config)


def check_reference() -> None:
    """A converted layer equals the paper's formula, quadratic in time, within 1e-6."""
    x = frames()
    for mode in ("full", "fast", "expdecay"):
        site = anatomy.of(converted(SummaryMixing(mode=mode))).sites("self_attention")[0]
        wanted = summary_mixing_reference(site.module.mixer, x)
        torch.testing.assert_close(site.module(x)[0], wanted, rtol=0, atol=1e-6)


def check_parameters() -> None:
    """Parameters of a layer at D = 512: 4 D^2 / n + 2 D^2 + 5 D, and 4 D of the norms.

    Those of lite: 2 D^2 / n + 2 D, beside the branch; of fast: 4 D^2 + 3 D.
    """
    for wanted, settings in (
        (1_577_472, SummaryMixing(heads=1)),
        (788_992, SummaryMixing(heads=4, layer_norm=False)),
        (659_968, SummaryMixing()),
        (525_312, SummaryMixing(mode="lite")),
        (132_096, SummaryMixing(mode="lite", heads=4)),
        (1_050_112, SummaryMixing(mode="fast")),
    ):
        with torch.device("meta"):
            size = {"hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}
            model = convert(presets.get("toy:conformer").main.make(**size), settings)
        layer: Any = anatomy.of(model).sites("self_attention")[0].module
        count = sum(p.numel() for p in layer.mixer.parameters())
        assert count == wanted, f"{settings.spec()}: {count} parameters, the paper has {wanted}"


def check_padding() -> None:
    """Utterances in a padded batch give what they give alone, within 1e-5, chunked or not."""
    x, lengths = frames(3), (30, 17, 4)
    valid = torch.arange(30) < torch.tensor(lengths)[:, None]
    padded = torch.where(valid[..., None], x, 7.0)
    for mode in (*MODES, "expdecay"):
        model = converted(SummaryMixing(mode=mode))
        for chunk, left in ((None, None), (7, None), (7, 1)):
            set_chunks(model, chunk, left)
            y = encoded(model, padded, valid)
            for i, length in enumerate(lengths):
                alone = encoded(model, x[i : i + 1, :length])
                torch.testing.assert_close(y[i : i + 1, :length], alone, rtol=0, atol=1e-5)


def check_stream() -> None:
    """A stream gives what all frames at once give under the mask of its chunks, within 1e-5."""
    x = frames()
    valid = torch.arange(30) < torch.tensor([[30], [23]])
    for mode in MODES:
        model = converted(SummaryMixing(mode=mode, branch=True))
        for left in (None, 0, 2):
            set_chunks(model, 7, left)
            whole = encoded(model, x, valid)
            stream = EncoderStream(model)
            with torch.no_grad():
                parts = [stream(*p) for p in zip(x.split(7, 1), valid.split(7, 1), strict=True)]
            got = torch.cat(parts, dim=1)
            torch.testing.assert_close(got[valid], whole[valid], rtol=0, atol=1e-5)


def check_future() -> None:
    """Nothing comes from behind a frame's chunk: the gradient there is exactly zero."""
    for mode in MODES:
        model = converted(SummaryMixing(mode=mode))
        set_chunks(model, 5)
        x = frames(1).requires_grad_(True)
        (gradient,) = torch.autograd.grad(
            encoder_of(model)(x * 1).last_hidden_state[0, 11].sum(), x
        )
        assert not gradient[0, 15:].any(), f"{mode}: frame 11 hears frames behind its chunk"
        assert gradient[0, :15].any(dim=-1).all(), f"{mode}: frame 11 doesn't hear all before"


def check_equal_shares() -> None:
    """In one layer all other frames count the same, and swapping them swaps nothing else."""
    order = torch.tensor([*range(10), 25, *range(11, 25), 10, *range(26, 30)])
    for mode in MODES:
        layer = anatomy.of(converted(SummaryMixing(mode=mode))).sites("self_attention")[0].module
        x = frames(1)
        torch.testing.assert_close(
            layer.mixer(x[:, order]), layer.mixer(x)[:, order], rtol=0, atol=1e-6
        )
        x[:, 9] = x[:, 21]
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(layer.mixer(x)[0, 3].sum(), x)
        assert gradient[0, 9].abs().sum() > 0, f"{mode}: a frame isn't heard"
        torch.testing.assert_close(gradient[0, 9], gradient[0, 21], rtol=0, atol=1e-6)


def check_lite() -> None:
    """In lite the mean is the same for all frames, and the branch beside it tells them apart."""
    layer = anatomy.of(converted(SummaryMixing(mode="lite"))).sites("self_attention")[0].module
    x = frames()
    mean = layer.mixer(x)
    assert torch.equal(mean[:, 1:], mean[:, :-1]), "the mean differs between frames"
    assert layer(x)[0].std(dim=1).min() > 1e-3, "the branch gives all frames the same"
