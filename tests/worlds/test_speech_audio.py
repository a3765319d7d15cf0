"""Sound files: anything is taken and converted, and what can't be is told in one sentence."""

import errno
import io
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import signal

from pared.errors import InputError
from pared.worlds.speech import audio, mp3


def sine(frequency, rate, seconds=0.5, amplitude=0.5):
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return (amplitude * torch.sin(2 * math.pi * frequency * time)).float()


def middle(waveform, share=0.1):
    edge = int(share * len(waveform))
    return waveform[edge:-edge]


def decibel(ratio):
    return 20 * math.log10(max(float(ratio), 1e-12))


# Resampling


@pytest.mark.parametrize("rate", [8000, 11025, 15999, 22050, 44100, 48000, 96000])
def test_what_both_rates_hold_comes_through(rate):
    for frequency in (100, 1000, 3400):
        found = audio.resampled(sine(frequency, rate), rate)
        wanted = sine(frequency, audio.RATE)
        assert abs(len(found) - len(wanted)) <= 1
        length = min(len(found), len(wanted))
        error = middle(found[:length] - wanted[:length]).abs().amax()
        assert decibel(error / 0.5) < -70


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
@pytest.mark.parametrize("frequency", [9000, 10500])
def test_what_the_lower_rate_cant_hold_is_gone(rate, frequency):
    found = audio.resampled(sine(frequency, rate), rate)
    assert decibel(middle(found).abs().amax() / 0.5) < -70


def test_no_images_above_what_came_in():
    found = middle(audio.resampled(sine(1000, 8000), 8000))
    spectrum = torch.fft.rfft(found * torch.hann_window(len(found))).abs()
    frequency = torch.fft.rfftfreq(len(found), 1 / audio.RATE)
    assert decibel(spectrum[frequency > 4500].amax() / spectrum.amax()) < -70


@pytest.mark.parametrize("rate, length", [(22050, 441), (22050, 1), (48000, 100), (44100, 0)])
def test_length_is_rounded_up(rate, length):
    assert len(audio.resampled(torch.ones(length), rate)) == math.ceil(length * 16000 / rate)


def test_resampling_is_what_scipy_gives_within_the_band():
    noise = torch.randn(22050, generator=torch.Generator().manual_seed(0))
    low = torch.from_numpy(signal.lfilter(signal.firwin(255, 6000, fs=22050), 1, noise.numpy()))
    wanted = torch.from_numpy(signal.resample_poly(low.numpy(), 320, 441, window=("kaiser", 12.0)))
    error = middle(audio.resampled(low.float(), 22050) - wanted)
    assert decibel(error.square().mean().sqrt() / wanted.square().mean().sqrt()) < -45


def test_long_sounds_are_resampled_in_blocks_without_seams():
    long = sine(440, 44100, seconds=20)
    whole = audio.resampled(long, 44100)
    wanted = sine(440, audio.RATE, seconds=20)
    assert (middle(whole - wanted)).abs().amax() < 1e-3


# Files


def test_written_and_read_again(tmp_path):
    pytest.importorskip("soundfile")
    waveform = sine(440, audio.RATE)
    audio.write(tmp_path / "tone.wav", waveform)
    assert (audio.read(tmp_path / "tone.wav") - waveform).abs().amax() <= 0.5 / 32768 + 1e-7
    assert [path.name for path in tmp_path.iterdir()] == ["tone.wav"]
    samples, rate = audio.read_pcm(tmp_path / "tone.wav")
    assert samples.dtype == torch.int16 and rate == audio.RATE and len(samples) == len(waveform)
    audio.write(tmp_path / "loud.wav", 3 * waveform)
    assert audio.read(tmp_path / "loud.wav").abs().amax() == 1


def test_what_cant_be_written(tmp_path):
    with pytest.raises(InputError, match=r"shape \(2, 4\) can't be stored"):
        audio.write(tmp_path / "two.wav", torch.zeros(2, 4))
    with pytest.raises(InputError, match="with NaN samples can't be stored"):
        audio.write(tmp_path / "nan.wav", torch.tensor([0.0, math.nan]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "format, subtype, tolerance",
    [
        ("WAV", "PCM_U8", -35),
        ("WAV", "PCM_16", -80),
        ("WAV", "PCM_24", -80),
        ("WAV", "PCM_32", -80),
        ("WAV", "FLOAT", -80),
        ("WAV", "DOUBLE", -80),
        ("WAVEX", "PCM_16", -80),
        ("FLAC", "PCM_16", -80),
        ("FLAC", "PCM_24", -80),
        ("OGG", "VORBIS", -25),
        ("MP3", "MPEG_LAYER_III", -20),
    ],
)
@pytest.mark.parametrize("rate", [8000, 44100])
def test_any_format_rate_and_number_of_channels(format, subtype, tolerance, rate):
    soundfile = pytest.importorskip("soundfile")
    left, right = sine(440, rate, amplitude=0.6).numpy(), sine(440, rate, amplitude=0.4).numpy()
    stored = io.BytesIO()
    soundfile.write(stored, np.stack([left, right], 1), rate, format=format, subtype=subtype)
    found = audio.read(stored.getvalue())
    wanted = sine(440, audio.RATE)
    if format == "MP3":  # begins later; what counts is how loud the tone is
        found = torch.fft.rfft(found).abs().amax() * 2 / len(found)
        assert found == pytest.approx(0.5, abs=0.1)
        return
    assert found.dtype == torch.float32 and abs(len(found) - len(wanted)) <= 1
    length = min(len(found), len(wanted))
    error = middle(found[:length] - wanted[:length]).square().mean().sqrt()
    assert decibel(error / wanted.square().mean().sqrt()) < tolerance


def content(samples, format="WAV", rate=16000, subtype="FLOAT"):
    soundfile = pytest.importorskip("soundfile")
    stored = io.BytesIO()
    soundfile.write(stored, np.asarray(samples, np.float32), rate, format=format, subtype=subtype)
    return stored.getvalue()


TONE = sine(440, 16000).numpy()


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: b"", "is empty"),
        (lambda: b"not a sound at all" * 20, "is damaged, or no WAV, FLAC, OGG or MP3"),
        (lambda: content(TONE)[:-1000], "is cut off: its last 1000 bytes are missing"),
        (lambda: content(TONE, "FLAC", subtype="PCM_16")[:-1000], "is (cut off|damaged)"),
        (
            lambda: content(TONE, "OGG", subtype="VORBIS")[:-1000],
            "is cut off: its last page is missing",
        ),
        (lambda: content(TONE[:0]), "has no samples"),
        (lambda: content(0 * TONE), "is silent from beginning to end"),
        (
            lambda: content(np.where(np.arange(8000) == 4000, np.nan, TONE)),
            r"has a sample that is NaN .* at 0\.250 s",
        ),
        (
            lambda: content(np.where(np.arange(8000) == 8, np.inf, TONE)),
            r"has a sample .* infinite, at 0\.001 s",
        ),
    ],
    ids=["empty", "text", "cut wav", "cut flac", "cut ogg", "no samples", "silent", "nan", "inf"],
)
def test_bad_files_are_told_in_one_sentence(make, told, tmp_path):
    stored = make()
    path = tmp_path / "bad.wav"
    path.write_bytes(stored)
    for source, name in ((path, re.escape(str(path))), (stored, "the recording")):
        with pytest.raises(InputError, match=f"^'?{name}'? {told}.*; give a whole recording that"):
            audio.read(source)


def test_a_wav_of_unknown_length_is_taken():
    """Programs that write to a pipe don't know how long a sound will be."""
    stored = bytearray(content(TONE, subtype="PCM_16"))
    place = stored.index(b"data") + 4
    stored[place : place + 4] = b"\xff\xff\xff\xff"
    assert len(audio.read(bytes(stored))) == len(TONE)


def from_a_pipe(samples):
    """A FLAC whose header doesn't tell how many samples there are."""
    stored = bytearray(content(samples, "FLAC", subtype="PCM_16"))
    stored[21] &= 0xF0
    stored[22:26] = bytes(4)
    return bytes(stored)


@pytest.mark.parametrize("samples", [8000, 2000], ids=["8000", "a block"])
def test_a_flac_of_unknown_length_is_taken(samples, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK", 2000)
    told, untold = content(TONE[:samples], "FLAC", subtype="PCM_16"), from_a_pipe(TONE[:samples])
    assert torch.equal(audio.read(untold), audio.read(told))
    assert sum(map(len, audio.read_blocks(untold))) == samples
    audio.check(untold)
    with audio.opened(untold) as file:
        assert file.frames == audio.UNKNOWN_FRAMES and audio.frames_of(file) == samples
    with pytest.raises(InputError, match="is silent from beginning to end"):
        audio.check(from_a_pipe(0 * TONE))


# MP3s


def mp3_of(seconds, rate=44100, mode="CONSTANT", samples=None):
    soundfile = pytest.importorskip("soundfile")
    stored = io.BytesIO()
    samples = sine(440, rate, seconds).numpy() if samples is None else samples
    settings = {"format": "MP3", "bitrate_mode": mode, "compression_level": 0.5}
    soundfile.write(stored, samples, rate, **settings)
    return stored.getvalue()


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("seconds", [0.3, 4])
def test_an_mp3_lasts_as_long_as_its_frames(rate, mode, seconds, tmp_path):
    stored = mp3_of(seconds, rate, mode)
    assert seconds <= mp3.seconds(stored) < seconds + audio.PADDING
    assert len(audio.read(stored)) == pytest.approx(seconds * 16000, abs=1)
    # With tags before it and behind, in which some bytes look like the beginnings of frames.
    tag = b"ID3\4\0\0\0\0\x0f\x50" + (7 * b"\xff\xfb\x90\0\0").ljust(2000, b"\0")
    (tmp_path / "tagged.mp3").write_bytes(tag + stored + b"TAG" + bytes(125))
    assert mp3.seconds(tmp_path / "tagged.mp3") == mp3.seconds(stored)
    assert torch.equal(audio.read(tmp_path / "tagged.mp3"), audio.read(stored))


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_joined_mp3s_are_refused_rather_than_halved(mode, tmp_path):
    path = tmp_path / "both.mp3"
    path.write_bytes(mp3_of(2, mode=mode) + mp3_of(3, 22050, mode))
    told = r"lasts 5\.\d s, of which only the first 2\.0 can be read, as in joined files \(`ffmpeg"
    for reads in (audio.read, audio.check, lambda source: next(audio.read_blocks(source))):
        for source in (path, path.read_bytes()):
            with pytest.raises(InputError, match=told):
                reads(source)


def test_an_mp3_that_tells_no_length_is_taken_where_the_guess_is_right():
    """Without the frame that tells it, it's guessed by the bitrate of the first."""
    stored = mp3_of(4)
    first = mp3._frame(stored, 0).size
    assert b"Info" in stored[:first]
    assert len(audio.read(stored[first:])) == pytest.approx(4 * 16000, rel=0.02)
    # A loud beginning in many bits, of which a guess makes few frames.
    noise = np.random.default_rng(0).normal(0, 0.2, 3 * 44100) * np.repeat([1, 0.01, 1], 44100)
    varied = mp3_of(3, mode="VARIABLE", samples=noise)
    assert len(audio.read(varied)) == 3 * 16000
    with pytest.raises(InputError, match=r"lasts 3\.\d s, of which only the first \d\.\d can be"):
        audio.read(varied[mp3._frame(varied, 0).size :])


def test_a_missing_file_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"gone\.wav' doesn't exist or is no file"):
        audio.read(tmp_path / "gone.wav")
    monkeypatch.setitem(sys.modules, "soundfile", None)  # how Python marks a blocked import
    with pytest.raises(InputError, match=r"needs the package 'soundfile'.*pared\[speech\]"):
        audio.read(tmp_path / "any.wav")


def test_a_file_that_cant_be_read(tmp_path, monkeypatch):
    path = tmp_path / "mine.wav"
    path.write_bytes(content(TONE))

    def locked(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    # What the administrator, whom tests may run as, is never told.
    monkeypatch.setattr(Path, "open", locked)
    for told in (audio.read, audio.check, lambda source: next(audio.read_blocks(source))):
        with pytest.raises(
            InputError, match=r"mine\.wav' can't be read \(Permission denied\); give"
        ):
            told(path)
    with pytest.raises(InputError, match=r"can't be read \(File name too long\)"):
        audio.read("x" * 300)
    with pytest.raises(InputError, match=r"'~nobody-is-here/x\.wav' doesn't exist"):
        audio.read("~nobody-is-here/x.wav")


def test_silence_around_a_sound_is_trimmed():
    tone = sine(440, audio.RATE, seconds=0.3)
    sound = torch.nn.functional.pad(tone, (4000, 9000))
    found = audio.trimmed(sound)
    assert len(tone) <= len(found) <= len(tone) + 2 * 0.03 * audio.RATE
    assert torch.equal(audio.trimmed(torch.zeros(100)), torch.zeros(100))


# Block by block


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 15999])
@pytest.mark.parametrize("size", [1, 1000, 40_000])
def test_a_sound_that_comes_in_pieces_is_resampled_as_a_whole(rate, size):
    noise = torch.randn(size * 3 if size == 1 else rate + 17, generator=torch.manual_seed(0))
    resampler = audio.Resampler(rate)
    found = torch.cat([*map(resampler, noise.split(size)), resampler.flush()])
    # Rounding of sums over other numbers of rows.
    torch.testing.assert_close(found, audio.resampled(noise, rate), rtol=0, atol=1e-5)


def test_another_rate_may_be_wanted():
    found = torch.cat(list(audio.read_blocks(content(TONE), 8000)))
    torch.testing.assert_close(found, audio.resampled(torch.from_numpy(TONE), 16000, 8000))


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_file_block_by_block(rate, monkeypatch):
    samples = np.random.default_rng(0).normal(0, 0.1, (20_000, 2))
    stored = content(samples, "FLAC", rate, "PCM_24")
    whole = audio.read(stored)
    monkeypatch.setattr(audio, "BLOCK", 3000)
    blocks = list(audio.read_blocks(stored))
    assert max(map(len, blocks)) <= 3000 + 160 and len(blocks) == 8
    torch.testing.assert_close(torch.cat(blocks), whole, rtol=0, atol=1e-5)


def test_faults_show_where_they_are(monkeypatch):
    monkeypatch.setattr(audio, "BLOCK", 1000)
    bad = content(np.where(np.arange(8000) == 4000, np.nan, TONE))
    blocks = audio.read_blocks(bad)
    assert sum(len(next(blocks)) for _ in range(4)) == 4000
    for told in (lambda: next(blocks), lambda: audio.check(bad)):
        with pytest.raises(InputError, match=r"has a sample that is NaN .* at 0\.250 s"):
            told()
    with pytest.raises(InputError, match="is silent from beginning to end"):
        audio.check(content(0 * TONE))
    audio.check(content(TONE))
