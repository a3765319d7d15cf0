"""What must hold of log-mel frames in a speech encoder without trained weights.

Run by `pared check mel-front`.
"""

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pared.anatomy import presets
from pared.method import convert, parse
from pared.speech.mel_front import RATE, LogMel, filters, least_points

# The paper's extractor: 80 bands, then two convolutions of 512 channels.
PAPER = {
    "conv_dim": (80, 512, 512),
    "conv_kernel": (400, 3, 3),
    "conv_stride": (160, 2, 1),
    "conv_bias": False,
    "feat_extract_norm": "layer",
}


def small(*methods: str) -> nn.Module:
    """A small Conformer for pre-training over log-mel frames, in eval mode, its weights stirred."""
    front = PAPER | {"conv_dim": (40, 24, 24)}
    settings = presets.get("toy:conformer").main.config | {"mask_time_prob": 0.5} | front
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls: Any = transformers.Wav2Vec2ConformerForPreTraining
        model = cls(cls.config_class(**settings))
        convert(model, *map(parse, ("mel-front", *methods))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def noise(*shape: int) -> Tensor:
    """Random samples."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def check_tones() -> None:
    """A tone is loudest in the band that its frequency falls into."""
    time = torch.arange(RATE) / RATE
    centres = torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), 82)[1:-1]
    for band in (20, 40, 60, 75):
        frequency = 700 * (10 ** (float(centres[band]) / 2595) - 1)
        found = LogMel(80, 400, 160).decibels(torch.sin(2 * math.pi * frequency * time)[None])
        assert found.mean(dim=(0, 1)).argmax() == band, f"{frequency:.0f} Hz isn't in band {band}"


def check_filters() -> None:
    """No band is without points of the spectrum: of the paper's 400 points, of more bands' more."""
    assert least_points(80) <= 400, "the paper's spectrum is too short"
    for bands in (20, 80, 128, 512):
        empty = filters(bands, max(400, least_points(bands))).amax(dim=0) <= 0
        assert not empty.any(), f"of {bands} bands, {int(empty.sum())} are empty"


def check_normalised() -> None:
    """Every band has mean 0 and variance 1 over an utterance, and loudness makes no difference."""
    mel = LogMel(80, 400, 160)
    x = noise(2, 1, RATE)
    y = mel(x)
    assert y.shape == (2, 80, 101), f"a second has frames {tuple(y.shape)}"
    torch.testing.assert_close(y.mean(dim=-1), torch.zeros(2, 80), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(dim=-1, correction=0), torch.ones(2, 80), rtol=0, atol=1e-4)
    torch.testing.assert_close(mel(0.1 * x), y, rtol=0, atol=1e-3)


def check_lengths() -> None:
    """A second has 101 frames and 48 latents, as in the paper; the model tells what it makes."""
    model = small()
    assert LogMel(80, 400, 160)(noise(1, 1, RATE)).shape[-1] == 101
    for samples, wanted in (
        (RATE, 48),
        (RATE - 1, 47),
        (RATE + 159, 48),
        (RATE + 160, 48),
        (5000, 13),
    ):
        told = int(model._get_feat_extract_output_lengths(samples))
        with torch.no_grad():
            made = model.wav2vec2_conformer(noise(1, samples)).extract_features.shape[1]
        assert told == made == wanted, f"{samples} samples: told {told}, made {made}"


def check_padding() -> None:
    """Utterances in a padded batch give what they give alone, within 1e-4, masked or not.

    Whatever stands in the padding: windows that reach into it hear zeros, as at the end.
    """
    lengths = (16_000, 11_000, 5_000)
    x = noise(3, 16_000)
    valid = (torch.arange(16_000) < torch.tensor(lengths)[:, None]).long()
    for methods in (("summarymixing-asr",), ("rope-asr",)):
        model = small(*methods).wav2vec2_conformer
        for hidden in (None, torch.arange(48).expand(3, -1) % 5 == 0):
            with torch.no_grad():
                given = {"attention_mask": valid, "mask_time_indices": hidden}
                whole = model(x, **given).last_hidden_state
                for row, length in enumerate(lengths):
                    sound = x[row : row + 1, :length]
                    frames = int(model._get_feat_extract_output_lengths(length))
                    own = None if hidden is None else hidden[:1, :frames]
                    alone = model(sound, mask_time_indices=own).last_hidden_state
                    torch.testing.assert_close(
                        whole[row : row + 1, :frames], alone, rtol=0, atol=1e-4
                    )
