"""Measures of enhanced speech: known values, what each of them notices, what they refuse."""

import builtins
import sys

import pytest
import torch

from pared.bench import sound
from pared.errors import InputError
from tests.speech.tones import Tones


def voices(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Tones().recording(torch.arange(count), generator)


def hiss(signals, snr, seed=1):
    noise = torch.randn(signals.shape, generator=torch.Generator().manual_seed(seed))
    power = signals.square().mean(dim=1, keepdim=True) * 10 ** (-snr / 10)
    return signals + noise * power.sqrt()


# Ratios -----------------------------------------------------------------------------------------


def test_improvement_is_the_difference_of_ratios():
    target = voices()
    noisy, better = hiss(target, 0), hiss(target, 7)
    torch.testing.assert_close(
        sound.improvement(better, target, noisy), torch.full((4,), 7.0), rtol=0, atol=0.2
    )
    # Louder isn't better.
    torch.testing.assert_close(
        sound.improvement(0.3 * noisy, target, noisy), torch.zeros(4), rtol=0, atol=1e-3
    )


def test_what_remains_of_a_recording():
    noisy = hiss(voices(), 0)
    remaining = sound.remainder(torch.stack([0.1 * noisy[0], noisy[1]]), noisy[:2])
    torch.testing.assert_close(remaining, torch.tensor([-20.0, 0.0]), rtol=0, atol=1e-4)
    assert sound.remainder(0 * noisy, noisy).amax() < -60


# Published measures -----------------------------------------------------------------------------


def test_pesq_falls_with_noise():
    pytest.importorskip("pesq")
    target = voices(2)
    assert sound.pesq(target, target).tolist() == pytest.approx([4.644, 4.644], abs=1e-3)
    noisy = [sound.pesq(hiss(target, snr), target).mean() for snr in (40, 30, 10)]
    assert 4.6 > noisy[0] > noisy[1] > noisy[2] > 1


def test_silence_has_no_pesq():
    pytest.importorskip("pesq")
    target = voices(2)
    estimate = target * torch.tensor([[1.0], [0.0]])
    assert sound.pesq(estimate, target).isnan().tolist() == [False, True]
    assert sound.pesq(target, estimate).isnan().tolist() == [False, True]


def test_pesq_needs_a_quarter_of_a_second():
    pytest.importorskip("pesq")
    with pytest.raises(InputError, match=r"last 0\.250 s; PESQ needs at least 0\.25 s"):
        sound.pesq(voices()[:, :3999], voices()[:, :3999])


def test_estoi_falls_with_noise():
    pytest.importorskip("pystoi")
    target = voices(2)
    assert sound.estoi(target, target).tolist() == pytest.approx([1, 1], abs=1e-6)
    noisy = [sound.estoi(hiss(target, snr), target).mean() for snr in (30, 10, -10)]
    assert 1 > noisy[0] > noisy[1] > noisy[2]


def test_little_or_no_speech_has_no_estoi():
    pytest.importorskip("pystoi")
    target = voices(2) * torch.tensor([[1.0], [0.0]])
    assert sound.estoi(target, target).isnan().tolist() == [False, True]
    assert sound.estoi(target[:, :4000], target[:, :4000]).isnan().all()


@pytest.mark.slow  # the first call compiles for a minute
def test_dnsmos_falls_with_noise():
    for package in ("speechmos", "librosa", "requests"):
        pytest.importorskip(package)
    target = voices(1)
    clean, noisy = sound.dnsmos(target), sound.dnsmos(hiss(target, 0))
    assert clean.keys() == {"speech", "background", "overall"}
    assert clean["background"] > noisy["background"]
    assert all(1 <= float(mark) <= 5 for mark in clean.values())


@pytest.mark.parametrize("package, measure", [("pesq", sound.pesq), ("pystoi", sound.estoi)])
def test_a_missing_package_is_named(package, measure, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"needs the package '{package}', .* pip install 'pared\[measure-speech\]' brings it"
    with pytest.raises(InputError, match=words):
        measure(voices(), voices())


@pytest.mark.parametrize("missing", ["speechmos", "librosa"])
def test_dnsmos_names_what_is_missing(missing, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "speechmos":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=f"DNSMOS needs the package '{missing}'"):
        sound.dnsmos(voices())


# One wanted voice -------------------------------------------------------------------------------


def test_what_is_taken_from_the_target_is_noticed():
    target = voices(3)
    half = target.clone()
    half[:, 8000:] = 0
    suppressed = sound.oversuppression(torch.stack([target[0], half[1], 0 * target[2]]), target)
    assert suppressed[0] == 0 and 0.2 < suppressed[1] < 0.8 and suppressed[2] == 1
    # What comes in addition is no suppression, nor is a little less of it.
    assert sound.oversuppression(hiss(target, 0), target).amax() < 0.05
    assert sound.oversuppression(0.6 * target, target).amax() < 0.05
    assert sound.oversuppression(target, 0 * target).isnan().all()


def test_only_the_right_voice_both_times_is_a_flip():
    target, other = voices(2), voices(2, seed=5).flip(0)
    mixture = target + other
    assert sound.flips(target + 0.1 * other, other + 0.1 * target, target, other).all()
    assert not sound.flips(mixture, mixture, target, other).any()
    assert not sound.flips(target, target, target, other).any()
    assert not sound.flips(other, target, target, other).any()


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimate, words",
    [
        (torch.zeros(4, 7), r"shapes \(4, 7\), \(4, 16000\); give all of them as \(batch, samples"),
        (torch.zeros(16000), r"shapes \(16000,\), \(4, 16000\)"),
        (torch.full((4, 16000), torch.nan), "torch.float32 with 64000 samples that are NaN"),
        (torch.zeros(4, 16000, dtype=torch.int16), "a signal is torch.int16"),
    ],
)
def test_what_is_no_pair_of_signals(estimate, words):
    with pytest.raises(InputError, match=words):
        sound.remainder(estimate, voices())
