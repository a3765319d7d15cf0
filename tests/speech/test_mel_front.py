"""Log-mel frames before an encoder: their checks, what is left of the model, and what refuses."""

import copy
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


@pytest.mark.parametrize("name", ["toy:conformer", "toy:wav2vec2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_count_of_frames_is_true(name, batch):
    """Of the model, of what reads its samples, and of a copy."""
    model = presets.build(name, device="cpu")
    stock = model._get_feat_extract_output_lengths(2055)
    pared.convert(model, pared.parse("mel-front"))
    reader = model.get_submodule(anatomy.of(model).reader)
    lengths = torch.tensor([2055, 1603])[:batch]
    for one in (model, copy.deepcopy(model)):
        sounds, mask = anatomy.of(one).example(batch=batch, samples=2055)
        with torch.no_grad():
            made = anatomy.of(one).run(one.eval(), sounds, mask).shape[1]
        told = one._get_feat_extract_output_lengths(lengths)
        assert told[0] == made > stock
        assert torch.equal(told, reader._get_feat_extract_output_lengths(lengths))
    # The copy counts by itself.
    model.config.conv_stride = (500, 4, 4)
    assert one._get_feat_extract_output_lengths(2055) == told[0]


def test_pieces_of_a_sound_lie_on_its_grid():
    """Windows of a recording that begin on whole frames hear what windows of all of it hear."""
    mel, sound = LogMel(40, 400, 160), torch.randn(1, 16_000)
    whole, piece = mel.decibels(sound), mel.decibels(sound[:, 3200:12_800])
    torch.testing.assert_close(piece[:, 2:-2], whole[:, 22:79], rtol=0, atol=1e-4)


def test_silence_is_finite():
    assert not LogMel(20, 400, 160)(torch.zeros(1, 1, 4000)).any()


def test_whisper_reads_no_samples():
    model = presets.build("toy:whisper")
    with pytest.raises(InputError, match=r"mel-front can't be used on Whisper.*samples itself"):
        pared.convert(model, pared.parse("mel-front"))
