"""The enhancement loss: its terms against their definitions, and what each of them is for."""

import math

import pytest
import torch
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

import pared
from pared.objectives import enhancement
from pared.objectives.enhancement import Enhancement, confusion, si_sdr


def signals(*shape, seed=0):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_si_sdr_is_that_of_torchmetrics():
    estimate, target = signals(4, 2000), signals(4, 2000, seed=1)
    estimate = estimate + torch.tensor([0.1, 1, 10, -3])[:, None] * target
    torch.testing.assert_close(
        si_sdr(estimate, target),
        scale_invariant_signal_distortion_ratio(estimate, target),
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_perfect_estimate_costs_nothing_but_its_ratio():
    target = signals(2, 4000)
    terms = Enhancement().terms(target, target, target)
    assert terms["signal"] == pytest.approx(-enhancement.CEILING, abs=0.01)
    assert all(terms[name] == 0 for name in ("silence", "magnitude", "spectrum", "suppression"))


def test_terms_by_definition():
    enhanced, target, mixture = signals(1, 3000), signals(1, 3000, seed=1), signals(1, 3000, seed=2)
    window = torch.hann_window(512).sqrt()
    ours, wanted = (
        torch.stft(x, 512, 256, window=window, return_complex=True) for x in (enhanced, target)
    )
    gap = wanted.abs() ** 0.3 - ours.abs() ** 0.3
    complex_gap = torch.polar(ours.abs() ** 0.3, ours.angle()) - torch.polar(
        wanted.abs() ** 0.3, wanted.angle()
    )
    terms = Enhancement(sdr=2, magnitude=3, spectrum=4, suppression=5).terms(
        enhanced, target, mixture
    )
    # The constant that keeps roots finite is seen in the fifth digit of soft bins.
    torch.testing.assert_close(terms["signal"], -2 * si_sdr(enhanced, target)[0])
    torch.testing.assert_close(terms["magnitude"], 3 * gap.square().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        terms["spectrum"], 4 * complex_gap.abs().square().mean(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        terms["suppression"], 5 * gap.clamp(min=0).square().mean(), rtol=1e-4, atol=0
    )


def test_silent_targets_are_judged_by_what_is_left():
    target, mixture = signals(2, 4000), signals(2, 4000, seed=1)
    target[1] = 0
    enhanced = signals(2, 4000, seed=2)
    # Of both by one weight, so that they stay in proportion; one of two in either.
    terms = Enhancement(sdr=3).terms(enhanced, target, mixture)
    torch.testing.assert_close(terms["signal"], -3 * si_sdr(enhanced[:1], target[:1])[0] / 2)
    energy = enhanced[1].square().sum() + 1e-3 * mixture[1].square().sum()
    torch.testing.assert_close(terms["silence"], 3 * 10 * energy.log10() / 2)
    softer = Enhancement(sdr=3).terms(0.1 * enhanced, target, mixture)
    assert softer["silence"] < terms["silence"] - 15


def test_too_little_costs_more_than_too_much():
    target = signals(1, 4000)
    little, much = (
        Enhancement().terms(gain * target, target, target)["suppression"] for gain in (0.5, 2.0)
    )
    assert little > 0 and much == 0


def test_the_level_is_held():
    target = signals(1, 4000)
    terms = [Enhancement().terms(gain * target, target, target) for gain in (1.0, 3.0)]
    assert terms[1]["magnitude"] > terms[0]["magnitude"] + 0.1


@pytest.mark.parametrize("target", ["silent", "speech"])
def test_gradients_are_finite_even_for_silence(target):
    wanted = torch.zeros(1, 2000) if target == "silent" else signals(1, 2000)
    enhanced = torch.zeros(1, 2000, requires_grad=True)
    terms = Enhancement().terms(enhanced, wanted, torch.zeros(1, 2000))
    sum(terms.values()).backward()
    assert torch.isfinite(enhanced.grad).all()


def test_the_model_is_called_with_the_batch():
    seen = []

    def model(noisy, enrolment, samples):
        seen.append((noisy, enrolment, samples))
        return 0.5 * noisy

    batch = {
        "noisy": signals(2, 2000),
        "target": signals(2, 2000, seed=1),
        "enrolment": signals(2, 3000, seed=2),
        "enrolment_samples": torch.tensor([3000, 1000]),
    }
    terms = Enhancement()(model, batch, torch.Generator())
    assert [x is batch[k] for x, k in zip(seen[0], list(batch)[:1] + list(batch)[2:], strict=True)]
    wanted = Enhancement().terms(0.5 * batch["noisy"], batch["target"], batch["noisy"])
    assert terms == wanted


def test_spectra_cover_the_whole_signal():
    assert enhancement.spectra(signals(2, 2560)).shape == (2, 257, 11, 2)


def test_voices_are_told_apart_where_each_is_nearest_to_itself():
    voices = torch.eye(4, 16)
    alike = confusion(torch.stack([voices, 3 * voices]), torch.arange(4))
    mixed_up = confusion(torch.stack([voices, voices.roll(1, dims=0)]), torch.arange(4))
    assert alike < 0.001 and mixed_up > 9
    unknown = confusion(torch.ones(2, 4, 16), torch.arange(4))
    assert unknown == pytest.approx(math.log(4))


def test_the_same_speaker_is_not_held_against_a_voice():
    voices = torch.ones(2, 3, 8)
    assert confusion(voices, torch.tensor([5, 5, 5])) == 0
    assert confusion(voices, torch.tensor([5, 5, 7])) == pytest.approx(
        (2 * math.log(2) + math.log(3)) / 3
    )
    assert confusion(voices[:, :1], torch.tensor([5])) == 0


@pytest.mark.parametrize("conditioning", ["cross", "static_mean", "none"])
def test_targets_without_sound_have_no_voice(conditioning):
    model = pared.StreamingPSE(width=16, layers=1, conditioning=conditioning).build()
    batch = {
        "noisy": signals(3, 2048),
        "target": signals(3, 2048, seed=1),
        "enrolment": signals(3, 4096, seed=2),
        "speaker": torch.tensor([4, 9, 2]),
    }
    batch["target"][1] = 0
    generator = torch.Generator()
    plain, terms = (Enhancement(voice=v)(model, batch, generator) for v in (0, 0.5))
    assert all(torch.equal(terms[name], plain[name]) for name in plain)
    assert terms.keys() - plain.keys() == (set() if conditioning == "none" else {"voice"})
    if conditioning != "none":
        _, voices = model(batch["noisy"], batch["enrolment"], clean=batch["target"])
        expected = confusion(voices[:, [0, 2]], batch["speaker"][[0, 2]])
        torch.testing.assert_close(terms["voice"], 0.5 * expected)
        terms["voice"].backward()
        assert model.encoder.embed[0].weight.grad.abs().sum() > 0
