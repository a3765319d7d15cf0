"""Log-mel frames before an encoder: their checks, what is left of the model, and what refuses."""

import inspect

import pytest
import torch

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.speech import mel_front_checks
from pared.speech.mel_front import LogMel

CHECKS = [f for name, f in inspect.getmembers(mel_front_checks) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


@pytest.mark.parametrize("name", ["toy:conformer", "toy:wav2vec2"])
def test_all_else_stays(name):
    model = presets.build(name, device="cpu")
    path = anatomy.of(model).front
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(f"{path}.")}
    pared.convert(model, pared.parse("mel-front"))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in after)
    conv = presets.get(name).main.config
    mel = model.get_submodule(path)
    assert isinstance(mel, LogMel)
    assert (mel.bands, mel.window, mel.hop) == (
        conv["conv_dim"][0], conv["conv_kernel"][0], conv["conv_stride"][0],
    )  # fmt: skip


def test_silence_is_finite():
    assert not LogMel(20, 400, 160)(torch.zeros(1, 1, 4000)).any()


def test_whisper_reads_no_samples():
    model = presets.build("toy:whisper")
    with pytest.raises(InputError, match=r"mel-front can't be used on Whisper.*samples itself"):
        pared.convert(model, pared.parse("mel-front"))
