"""Rooms, noise, mixtures, and what training draws from them."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tests.worlds.tones import Tones

from pared.errors import InputError
from pared.training.data import generator_for
from pared.worlds.draws import Draw
from pared.worlds.speech import rooms
from pared.worlds.speech.audio import RATE
from pared.worlds.speech.characters import Characters
from pared.worlds.speech.data import EnhancementData, TranscriptData
from pared.worlds.speech.mixtures import Mixer, Mixing, coloured_noise, looped, rms, scaled
from pared.worlds.speech.rooms import Room
from pared.worlds.speech.talkers import Talkers, pitched

PLAIN = Mixing(
    interferers=(1, 1), sir=(0, 0), snr=None, room=0, absent=0, alone=0, enrolment_seconds=(1, 1)
)


def decibel(signal, noise):
    return 20 * math.log10(rms(signal) / rms(noise))


# Rooms


BOX = Room(torch.tensor([5.0, 4.0, 3.0]), torch.tensor([2.0, 1.5, 1.2]), 0.4)
PLACE = torch.tensor([3.5, 2.5, 1.7])


def test_image_sources_are_mirrored_places():
    distance, reflections = rooms.images(BOX, PLACE, 12.0)
    first = {round(float(d), 4) for d, n in zip(distance, reflections, strict=True) if n == 1}
    wanted = set()
    for axis in range(3):
        for wall in (0.0, float(BOX.size[axis])):
            mirrored = PLACE.clone()
            mirrored[axis] = 2 * wall - PLACE[axis]
            wanted.add(round(float(torch.dist(mirrored, BOX.microphone)), 4))
    assert first == wanted and (reflections == 0).sum() == 1
    assert float(distance[reflections == 0]) == pytest.approx(
        float(torch.dist(PLACE, BOX.microphone))
    )
    # One image in each volume of the room.
    far, _ = rooms.images(BOX, PLACE, 40.0)
    assert len(far) == pytest.approx(4 / 3 * math.pi * 40**3 / BOX.volume, rel=0.05)


def test_direct_sound_comes_when_and_as_loud_as_it_should():
    near = replace(BOX, t60=0.001)  # next to nothing comes back
    whole = rooms.early_response(near, PLACE, 0.02)
    distance = float(torch.dist(PLACE, BOX.microphone))
    assert whole.argmax() == round(distance / rooms.SOUND * RATE)
    assert whole.sum() == pytest.approx(1 / (4 * math.pi * distance), rel=0.02)


def test_delays_are_exact_between_samples():
    near = replace(BOX, t60=0.001)
    response = rooms.early_response(near, PLACE, 0.02)
    tone = torch.sin(2 * math.pi * 500 * torch.arange(1600) / RATE)
    delay = float(torch.dist(PLACE, BOX.microphone)) / rooms.SOUND
    wanted = torch.sin(2 * math.pi * 500 * (torch.arange(1600) / RATE - delay)) * response.sum()
    assert (rooms.heard(tone, response) - wanted)[400:].abs().amax() < 0.02 * response.sum()


@pytest.mark.parametrize("t60", [0.2, 0.4, 0.8])
def test_reverberation_lasts_as_long_as_asked(t60):
    """Schroeder: the energy still to come falls by 60 dB in t60; fitted from -5 to -35 dB."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(8):
        room = Room.drawn(generator, (t60, t60))
        _, whole = rooms.impulse_response(room, room.source(generator), generator)
        left = whole.square().flip(0).cumsum(0).flip(0)
        level = 10 * (left / left[0]).clamp(min=1e-9).log10()
        fall = [int((level < db).nonzero()[0]) for db in (-5, -35)]
        found.append(2 * (fall[1] - fall[0]) / RATE)
    assert sum(found) / len(found) == pytest.approx(t60, rel=0.15)


def test_late_reflections_go_on_where_the_images_end():
    """Energy of the last early and the first late 20 ms, over many rooms.

    Below the voice, images add up instead of cancelling: they all have the same sign.
    """
    generator = torch.Generator().manual_seed(1)
    ratios = []
    for _ in range(60):
        room = Room.drawn(generator, (0.5, 0.5))
        source = room.source(generator)
        early, whole = rooms.impulse_response(room, source, generator)
        end = round((float(torch.dist(source, room.microphone)) / rooms.SOUND + rooms.EARLY) * RATE)
        spectrum = torch.fft.rfft(whole)
        spectrum[: len(whole) * 200 // RATE] = 0
        voiced = torch.fft.irfft(spectrum, len(whole))
        before, after = voiced[end - 320 : end], voiced[end : end + 320]
        ratios.append(decibel(after, before))
        assert torch.equal(early[: end - 40], whole[: end - 40])
        assert early[end + rooms.TAPS :].abs().amax() == 0
    # 20 ms later 2.4 dB should be lost.
    assert sum(ratios) / len(ratios) == pytest.approx(-2.4, abs=0.7)


def test_rooms_are_drawn_within_bounds():
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        room = Room.drawn(generator, (0.2, 0.8))
        source = room.source(generator)
        assert 0.2 <= room.t60 <= 0.8 and 0 < room.reflection < 1
        for place in (source, room.microphone):
            assert (place >= 0.5).all() and (place <= room.size - 0.5).all()
        assert torch.dist(source, room.microphone) > 0.5


def test_hearing_in_a_room_is_a_convolution():
    generator = torch.Generator().manual_seed(3)
    waveform, response = (torch.randn(n, generator=generator) for n in (500, 120))
    wanted = F.conv1d(F.pad(waveform, (119, 0))[None, None], response.flip(0)[None, None])[0, 0]
    torch.testing.assert_close(rooms.heard(waveform, response), wanted, rtol=0, atol=1e-4)


# Noise


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_noise_has_its_colour(exponent):
    noise = coloured_noise(2**17, exponent, torch.Generator().manual_seed(0))
    power = torch.fft.rfft(noise).abs().square()
    frequency = torch.fft.rfftfreq(2**17, 1 / RATE)
    octaves = [power[(frequency >= f) & (frequency < 2 * f)].mean() for f in (125, 4000)]
    falls = 10 * math.log10(octaves[0] / octaves[1]) / 5  # dB in each of five octaves
    assert falls == pytest.approx(3.01 * exponent, abs=0.3)
    assert rms(noise) == pytest.approx(1, rel=1e-4)
    assert power[frequency < 15].sum() < 1e-6 * power.sum()


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
def test_scaling_is_exact(snr):
    generator = torch.Generator().manual_seed(0)
    signal, noise = torch.randn(2, 4000, generator=generator)
    assert decibel(signal, scaled(noise, signal, snr)) == pytest.approx(snr, abs=1e-4)
    assert rms(scaled(0 * noise, signal, snr)) < 1e-6  # nothing to be scaled


def test_recordings_are_looped():
    ramp = torch.arange(10.0)
    found = looped(ramp, 25, Draw(torch.Generator().manual_seed(0)))
    assert found.shape == (25,) and ((found[1:] - found[:-1]) % 10 == 1).all()


# Talkers


def test_speech_is_strung_together_with_pauses():
    tones = Tones()
    generator = torch.Generator().manual_seed(0)
    found = Talkers(tones).strung([0, 1], 5 * RATE, generator)
    assert found.shape == (5 * RATE,)
    quiet = found.unfold(0, 800, 800).abs().amax(dim=1) == 0
    assert 2 <= (quiet[1:] & ~quiet[:-1]).sum() <= 8  # pauses
    spectrum = torch.fft.rfft(found).abs()
    for utterance, there in ((0, True), (1, True), (2, False)):
        peak = spectrum[round(5 * tones.frequency(utterance))]
        assert (peak > spectrum.amax() / 10) == there


def test_an_utterance_for_hearing_is_none_for_enrolment():
    talkers = Talkers(Tones(speakers_count=3, each=5))
    generator = torch.Generator().manual_seed(0)
    for utterance in range(15):
        said, kept = talkers.divided(utterance, generator)
        assert said[0] == utterance and len(said) == 3
        assert {*said, *kept} == {*talkers.utterances[talkers.speaker_of(utterance)]}
        assert not {*said} & {*kept} and kept


def test_babble_is_without_the_one_who_is_to_be_kept():
    tones = Tones(seconds=2.0)
    for seed in range(5):
        babble = Talkers(tones).babble(6, 2 * RATE, generator_for(seed), without=1)
        spectrum = torch.fft.rfft(babble).abs()
        own = [spectrum[2 * tones.frequency(utterance)] for utterance in (3, 4, 5)]
        assert max(own) < 0.05 * spectrum.amax()


# Mixtures


def draws(mixing, count, speech=None, samples=RATE):
    mixer = Mixer(speech or Tones(), mixing, samples)
    return [mixer.mixture(n % 12, generator_for(7, n)) for n in range(count)]


def test_a_mixture_is_the_sum_of_its_parts_at_the_promised_ratios():
    for one in draws(replace(PLAIN, sir=(-5, 10), snr=(0, 20), babble=0.5), 24):
        assert one.mixture.shape == (RATE,) and one.mixture.abs().amax() <= 1
        parts = one.target + one.interference + one.noise
        torch.testing.assert_close(one.mixture, parts, rtol=0, atol=1e-6)
        assert decibel(one.target, one.interference) == pytest.approx(one.sir, abs=1e-3)
        assert decibel(one.target, one.noise) == pytest.approx(one.snr, abs=1e-3)
        assert -5 <= one.sir <= 10 and 0 <= one.snr <= 20 and one.present
        assert one.speaker not in one.interferers and len(one.interferers) == 1


def test_in_rooms_the_target_is_what_comes_first():
    for one in draws(replace(PLAIN, room=1, sir=(300, 300)), 8):
        late = one.mixture - one.target
        assert rms(late) > 0 and rms(one.target) > 0
        # Nothing of it can come before the target itself has begun, 50 ms earlier.
        begun = int((one.target.abs() > 1e-3 * one.target.abs().amax()).nonzero()[0])
        assert late[: begun + 600].abs().amax() < 1e-3 * one.mixture.abs().amax()


def test_in_rooms_ratios_are_to_the_target_as_heard():
    rooms_apart = []
    for one in draws(replace(PLAIN, room=1, t60=(0.8, 0.8), sir=(-5, 10), snr=(0, 20)), 8):
        heard = one.mixture - one.interference - one.noise
        assert decibel(heard, one.interference) == pytest.approx(one.sir, abs=0.01)
        assert decibel(heard, one.noise) == pytest.approx(one.snr, abs=0.01)
        rooms_apart.append(abs(decibel(heard, one.target)))
    assert max(rooms_apart) > 0.5, "what is wanted is as loud as what is heard"


def test_in_rooms_everyone_is_heard_from_a_place_of_their_own(monkeypatch):
    places, real = [], rooms.impulse_response

    def response(room, source, generator):
        places.append((room, source))
        return real(room, source, generator)

    monkeypatch.setattr(rooms, "impulse_response", response)
    for one in draws(replace(PLAIN, room=1, t60=(0.8, 0.8)), 6, samples=2 * RATE):
        # In a pause of at least 0.1 s a dry voice is silent; a room isn't before 1 s.
        loudness = one.interference.unfold(0, 800, 800).abs().amax(dim=1)
        begun = int((loudness > 0.01 * loudness.amax()).nonzero()[0])
        assert loudness[begun:].amin() > 1e-4 * loudness.amax()
    assert len(places) == 12
    for (room, first), (same, second) in zip(places[::2], places[1::2], strict=True):
        assert room is same and torch.dist(first, second) > 0


def test_where_the_target_is_missing_the_others_are_as_loud_as_beside_it():
    mixing = replace(PLAIN, snr=(0, 20), level=(-40, -40))
    there, missing = (draws(replace(mixing, absent=chance), 6) for chance in (0, 1))
    for one, other in zip(there, missing, strict=True):
        assert one.present and not other.present and not other.target.any()
        assert torch.equal(one.interference, other.interference)
        assert torch.equal(one.noise, other.noise)


def test_no_babble_has_the_voice_that_is_to_be_kept():
    """Neither in a mixture, where it would be removed, nor in the enrolment."""
    mixing = replace(
        PLAIN, interferers=(0, 0), snr=(-60, -60), babble=1, enrolment_noise=1,
        enrolment_seconds=(2, 2),
    )  # fmt: skip
    tones = Tones(seconds=2.0)
    for one in draws(mixing, 12, tones, 2 * RATE):
        for sound in (one.noise, one.enrolment):
            spectrum = torch.fft.rfft(sound).abs()
            own = [
                spectrum[2 * tones.frequency(n)]
                for n in range(3 * one.speaker, 3 * one.speaker + 3)
            ]
            assert max(own) < 0.05 * spectrum.amax()


def test_levels_keep_within_bounds():
    levels = [20 * math.log10(rms(one.target)) for one in draws(replace(PLAIN, sir=(90, 90)), 40)]
    assert min(levels) > -35.1 and max(levels) < -14.9 and max(levels) - min(levels) > 10


def test_how_often_there_is_no_target_or_nothing_else():
    mixing = replace(Mixing(room=0), enrolment_seconds=(0.1, 0.1))
    kinds, talkers = Counter(), Counter()
    for one in draws(mixing, 600, samples=1600):
        if not one.present:
            kinds["absent"] += 1
            assert one.target.abs().amax() == 0 and one.mixture.abs().amax() > 0
        elif math.isinf(one.snr):
            kinds["alone"] += 1
            assert torch.equal(one.mixture, one.target) and not one.interferers
        else:
            talkers[len(one.interferers)] += 1
    assert kinds["absent"] / 600 == pytest.approx(0.1, abs=0.04)
    assert kinds["alone"] / 600 == pytest.approx(0.2, abs=0.05)
    assert all(talkers[n] / 420 == pytest.approx(1 / 3, abs=0.08) for n in range(3))


def test_a_mixture_follows_from_its_generator():
    first, again = (draws(Mixing(enrolment_seconds=(1, 2)), 3) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.mixture, other.mixture)
        assert torch.equal(one.enrolment, other.enrolment)
    assert not torch.equal(first[0].mixture, first[1].mixture)


def test_enrolment_is_of_the_target_and_of_another_utterance():
    tones = Tones(seconds=1.0)
    for one in draws(replace(PLAIN, enrolment_noise=0), 12, tones):
        heard = torch.fft.rfft(one.target, RATE).abs()
        enrolled = torch.fft.rfft(one.enrolment, RATE).abs()
        own = [tones.frequency(n) for n in Talkers(tones).utterances[one.speaker]]
        assert enrolled.argmax() in own and heard.argmax() in own
        assert enrolled.argmax() != heard.argmax()


def test_a_pitch_makes_another_talker_of_everyone_and_of_the_enrolment_the_same():
    tones = Tones(seconds=1.0)
    for one in draws(replace(PLAIN, enrolment_noise=0, pitch=(1.25, 1.25)), 12, tones):
        own = [1.25 * tones.frequency(n) for n in Talkers(tones).utterances[one.speaker]]
        theirs = [1.25 * tones.frequency(n) for n in Talkers(tones).utterances[one.interferers[0]]]
        for heard, of in (one.target, own), (one.enrolment, own), (one.interference, theirs):
            peak = int(torch.fft.rfft(heard, RATE).abs().argmax())
            assert min(abs(peak - frequency) for frequency in of) < 3
    varied = draws(replace(PLAIN, pitch=(0.8, 1.25)), 2, tones)
    peaks = [int(torch.fft.rfft(one.enrolment, RATE).abs().argmax()) for one in varied]
    assert all(peak not in map(tones.frequency, range(len(tones))) for peak in peaks)


def test_in_moods_every_utterance_is_of_another_pitch_and_all_around_the_talkers():
    """In mixture, interference and enrolment; to say nothing of moods draws nothing."""
    talkers = Talkers(Tones(seconds=1.0))
    steady, same, moody = (
        talkers.strung([0], 12 * RATE, generator_for(0), 2.0, mood)
        for mood in ((1.0, 1.0), (1.1, 1.1), (0.8, 1.25))
    )
    assert torch.equal(steady, talkers.strung([0], 12 * RATE, generator_for(0), 2.0))
    assert torch.equal(same, talkers.strung([0], 12 * RATE, generator_for(0), 2.2))
    assert tones_of(steady) == pytest.approx([220] * len(tones_of(steady)), abs=4)
    found = tones_of(moody)
    assert all(0.8 * 220 - 4 < tone < 1.25 * 220 + 4 for tone in found)
    assert max(found) - min(found) > 40 and len(found) > 8

    # Longer than what is heard of it, and far apart.
    tones = Tones(speakers_count=6, each=2, seconds=3.0)
    for one in draws(replace(PLAIN, enrolment_noise=0, mood=(0.8, 1.25)), 12, tones):
        factors = []
        for heard, who in (
            (one.target, one.speaker),
            (one.enrolment, one.speaker),
            (one.interference, one.interferers[0]),
        ):
            peak = int(torch.fft.rfft(heard, RATE).abs().argmax())
            factors.append(peak / tones.frequency(2 * who))
        assert all(0.75 < factor < 1.4 for factor in factors)
        assert max(factors) - min(factors) > 0.04  # the tones of one talker are not so far apart


def tones_of(strung):
    """The frequencies of tones between pauses."""
    sounding = strung.unfold(0, 160, 160).abs().amax(dim=1) > 0
    edges = [0, *(sounding[1:] != sounding[:-1]).nonzero().flatten().add(1).tolist()]
    whole = [(a, b) for a, b in pairwise([*edges, len(sounding)]) if sounding[a] and b - a > 30]
    pieces = [strung[160 * a : 160 * b] for a, b in whole]
    return [int(torch.fft.rfft(piece, RATE).abs().argmax()) for piece in pieces]


def test_pitch_is_that_of_a_recording_played_faster():
    tone = torch.sin(2 * math.pi * 200 * torch.arange(RATE) / RATE)
    higher = pitched(tone, 1.25)
    assert len(higher) == RATE / 1.25 and pitched(tone, 1.0) is tone
    wanted = torch.sin(2 * math.pi * 250 * torch.arange(len(higher)) / RATE + 0.005)
    torch.testing.assert_close(higher, wanted, rtol=0, atol=0.02)


def test_enrolments_are_noisy_as_often_as_asked():
    mixing = replace(PLAIN, snr=(0, 0), babble=0, enrolment_noise=0.3)
    mixer = Mixer(Tones(seconds=0.1), mixing, 800)
    noisy = 0
    for seed in range(200):
        enrolment = mixer.enrolment([0, 1], generator_for(seed))
        noisy += int(enrolment.unfold(0, 80, 80).abs().amax(dim=1).amin() > 0)
    assert noisy / 200 == pytest.approx(0.3, abs=0.08)


def test_recorded_noises_take_the_place_of_synthetic_ones():
    click = Tones(speakers_count=1, each=1, seconds=0.01)
    mixer = Mixer(Tones(), replace(PLAIN, interferers=(0, 0), snr=(0, 0)), RATE, noises=click)
    noise = mixer.mixture(4, generator_for(0)).noise
    torch.testing.assert_close(noise[160:], noise[:-160], rtol=0, atol=1e-6)


def test_what_cant_be_mixed():
    with pytest.raises(InputError, match="2 speakers are too few to mix one with 2 others"):
        Mixer(Tones(speakers_count=2), Mixing(), RATE)
    with pytest.raises(InputError, match="speaker 'tone 0' has only one utterance"):
        Mixer(Tones(each=1), Mixing(), RATE)
    with pytest.raises(InputError, match="1 speakers are too few to mix one with 1 others"):
        Mixer(Tones(speakers_count=1), replace(PLAIN, interferers=(0, 0), snr=(0, 5)), RATE)
    with pytest.raises(InputError, match="utterance 0 has no speaker"):
        Mixer(Anonymous(), Mixing(), RATE)


class Anonymous(Tones):
    speakers = [None] * 12


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"sir": (5, -5)}, "sir can't be from 5 to -5; swap them"),
        ({"room": 1.5}, r"room can't be 1\.5; it is a chance"),
        ({"interferers": (-1, 2)}, r"interferers=\(-1, 2\).* don't work"),
        ({"t60": (0, 0.5)}, r"t60=\(0, 0\.5\).* times above 0"),
        ({"absent": 0.6, "alone": 0.6}, "exclude each other"),
        ({"pitch": (0.0, 1.0)}, r"pitch=\(0\.0, 1\.0\) doesn't work; factors are above 0"),
        ({"mood": (0.0, 1.0)}, r"mood=\(0\.0, 1\.0\) doesn't work; factors are above 0"),
        ({"mood": (1.2, 0.8)}, r"mood can't be from 1\.2 to 0\.8; swap them"),
    ],
)
def test_settings_that_dont_work(wrong, told):
    with pytest.raises(InputError, match=told):
        Mixing(**wrong)


# Data


def test_batches_for_enhancement():
    data = EnhancementData(Tones(), Mixing(enrolment_seconds=(0.5, 1.5)), seconds=0.5)
    assert len(data) == 12
    batch = data.batch(torch.tensor([0, 5, 11]), generator_for(1))
    shapes = {name: tuple(entry.shape) for name, entry in batch.items()}
    longest = batch["enrolment_samples"].max().item()
    assert shapes == {
        "noisy": (3, 8000),
        "target": (3, 8000),
        "interference": (3, 8000),
        "enrolment": (3, longest),
        "enrolment_samples": (3,),
        "speaker": (3,),
        "interferers": (3, 2),
        "sir": (3,),
        "snr": (3,),
        "present": (3,),
    }
    assert batch["speaker"].tolist() == [0, 1, 3]
    assert batch["enrolment_samples"].min() >= 0.5 * RATE and longest <= 1.5 * RATE
    for name in ("noisy", "target", "enrolment"):
        assert batch[name].dtype == torch.float32 and batch[name].abs().amax() <= 1
    for row, length in zip(batch["enrolment"], batch["enrolment_samples"], strict=True):
        assert (row[length:] == 0).all()
    again = data.batch(torch.tensor([0, 5, 11]), generator_for(1))
    assert all(torch.equal(again[name], entry) for name, entry in batch.items())


def test_batches_for_recognisers_fit_ctc():
    data = TranscriptData(Tones(), snr=(0, 5))
    batch = data.batch(torch.tensor([3, 0, 7]), generator_for(1))
    assert batch["waveform"].shape == (3, batch["lengths"].max())
    assert batch["label_lengths"].tolist() == [6, 6, 6]
    assert Characters().decode(batch["labels"][0].tolist()) == "tone d"
    assert batch["waveform"].dtype == torch.float32 and batch["waveform"].abs().amax() <= 1
    for row, length in zip(batch["waveform"], batch["lengths"], strict=True):
        assert (row[length:] == 0).all() and row[:length].abs().amax() > 0
    scores = torch.zeros(40, 3, len(data.characters)).log_softmax(-1)
    loss = F.ctc_loss(
        scores, batch["labels"], torch.full((3,), 40), batch["label_lengths"], reduction="none"
    )
    assert loss.isfinite().all()


def test_recognisers_cant_learn_from_loudness_or_silence():
    data = TranscriptData(Tones())
    batches = [data.batch(torch.tensor([4]), generator_for(n)) for n in range(30)]
    lengths = [batch["lengths"].item() / RATE for batch in batches]
    levels = [20 * math.log10(batch["waveform"].abs().amax()) for batch in batches]
    said = len(Tones().waveform(4)) / RATE
    assert said <= min(lengths) < max(lengths) <= said + 0.6 and max(lengths) - min(lengths) > 0.2
    assert max(levels) - min(levels) > 10
    starts = {int(batch["waveform"][0].abs().gt(0).nonzero()[0]) for batch in batches}
    assert len(starts) > 20


def test_noise_for_recognisers_is_as_loud_as_asked():
    tones = Tones(seconds=1.0)
    clean = TranscriptData(tones, silence=0.0, level=(-30, -30))
    for source in (tones, Anonymous(seconds=1.0)):
        noisy = TranscriptData(source, silence=0.0, level=(-30, -30), snr=(5, 5))
        for seed in range(6):
            one, other = (
                data.batch(torch.tensor([2]), generator_for(seed))["waveform"][0]
                for data in (clean, noisy)
            )
            assert decibel(one, other - one) == pytest.approx(5, abs=0.01)


def test_recorded_noises_for_recognisers():
    click = Tones(speakers_count=1, each=1, seconds=0.01)
    clean, noisy = (
        TranscriptData(Tones(), silence=0.0, level=(-30, -30), **more)
        for more in ({}, {"snr": (5, 5), "noises": click})
    )
    one, other = (
        data.batch(torch.tensor([2]), generator_for(0))["waveform"][0] for data in (clean, noisy)
    )
    noise = other - one
    torch.testing.assert_close(noise[160:], noise[:-160], rtol=0, atol=1e-6)
    assert decibel(one, noise) == pytest.approx(5, abs=0.01)


def test_identity_changes_with_whatever_changes_the_data():
    enhancement = [
        EnhancementData(Tones()),
        EnhancementData(Tones(each=4)),
        EnhancementData(Tones(), Mixing(room=0.4)),
        EnhancementData(Tones(), seconds=3.0),
        EnhancementData(Tones(), noises=Tones(each=2)),
    ]
    transcripts = [
        TranscriptData(Tones()),
        TranscriptData(Tones(), snr=(0, 5)),
        TranscriptData(Tones(), Characters("abcdefghijkl onet")),
        TranscriptData(Tones(seconds=1.0)),
        TranscriptData(Tones(), silence=0.2),
        TranscriptData(Tones(), level=(-30, -20)),
        TranscriptData(Tones(), snr=(0, 5), noises=Tones(each=2)),
        TranscriptData(Tones(), snr=(0, 5), noises=Tones(each=1)),
    ]
    for alternatives in (enhancement, transcripts):
        assert len({data.identity() for data in alternatives}) == len(alternatives)
    assert enhancement[0].identity() == EnhancementData(Tones()).identity()


def test_data_that_dont_work():
    with pytest.raises(InputError, match="mixtures can't be 0 s long"):
        EnhancementData(Tones(), seconds=0)
    with pytest.raises(InputError, match="'tone a' has the character 't'"):
        TranscriptData(Tones(), Characters("xyz"))
    with pytest.raises(InputError, match="utterance 0 has no transcript"):
        TranscriptData(Unheard())


class Unheard(Tones):
    transcripts = [None] * 12
