"""`pared enrol` and `pared enhance`: files, pipes, a microphone, and all that can go wrong."""

import json
import os
import signal
import subprocess
import sys
import time
import types
import wave
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pared.cli import main, sound
from pared.errors import InputError
from pared.speech.streaming_pse import enrolment
from pared.speech.streaming_pse.method_checks import noise, toy
from pared.speech.streaming_pse.stream import Stream
from pared.worlds.speech import audio
from tests.signals import ctrl_c

WHOLE = noise(3 * 16000)


def pcm(samples) -> bytes:
    return audio.to_int16(samples).numpy().tobytes()


def heard(data: bytes) -> torch.Tensor:
    return (
        torch.empty(0)
        if not data
        else torch.frombuffer(bytearray(data), dtype=torch.int16).float() / 32768
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder with a model, a voice enrolled for it, and a recording."""
    folder = tmp_path_factory.mktemp("enhancer")
    enhancer = toy(window=512)
    enhancer.save_pretrained(folder / "model")
    enrolment.save(folder / "me.safetensors", enhancer, enrolment.enrol(enhancer, noise(32000)))
    audio.write(folder / "noisy.wav", WHOLE)
    return folder


@pytest.fixture(scope="module")
def wanted(kept) -> torch.Tensor:
    """What comes of the recording, offline."""
    enhancer = toy(window=512)
    voice = enrolment.load(kept / "me.safetensors", enhancer)
    with torch.no_grad():
        return enhancer.enhance(heard(pcm(WHOLE))[None], voice)[0]


@pytest.fixture
def enhance(kept, tmp_path, monkeypatch):
    """Runs `pared enhance` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(source, *words, given=b"", voice="me.safetensors"):
        line = ["enhance", source, "-e", kept / voice, "--model", kept / "model", *words]
        words = [str(word) for word in line]
        return CliRunner().invoke(main, words, prog_name="pared", input=given)

    return invoke


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    # Half a step of 16 bits, and a step where rounding decides otherwise.
    torch.testing.assert_close(got, wanted.clamp(-1, 1), rtol=0, atol=1.6 / 32768)


def read(path) -> torch.Tensor:
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        return heard(file.readframes(file.getnframes()))


# Files ------------------------------------------------------------------------------------------


def test_a_file_is_enhanced(enhance, kept, wanted, tmp_path):
    pytest.importorskip("soundfile")
    result = enhance(kept / "noisy.wav", "-o", "clean.wav")
    assert result.exit_code == 0, result.output
    close(read(tmp_path / "clean.wav"), wanted)
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("3.0 s enhanced with a real-time factor of ")
    assert second.startswith("latency: 32 ms by construction; each hop of 16 ms took ")
    assert "at the 50th percentile" in second and "at worst" in second


def test_the_report_as_json(enhance, kept):
    pytest.importorskip("soundfile")
    report = json.loads(enhance(kept / "noisy.wav", "-o", "clean.wav", "--json").stdout)
    assert report["hops"] == 189 and report["latency"] == 0.032 and report["threads"] == 1
    assert 0 < report["median"] <= report["p99"] <= report["worst"]


@pytest.mark.parametrize(
    "form",
    [
        {"rate": 44100, "channels": 2, "subtype": "FLOAT", "format": "WAV"},
        {"rate": 8000, "channels": 1, "subtype": "PCM_U8", "format": "WAV"},
        {"rate": 16000, "channels": 2, "subtype": "PCM_24", "format": "FLAC"},
        {"rate": 48000, "channels": 1, "subtype": "VORBIS", "format": "OGG"},
    ],
    ids=lambda form: form["format"] + form["subtype"],
)
def test_other_forms_are_converted(enhance, kept, tmp_path, form):
    soundfile = pytest.importorskip("soundfile")
    samples = noise(2 * form["rate"], form["channels"]).numpy()
    path = tmp_path / f"noisy.{form['format'].lower()}"
    soundfile.write(path, samples, form["rate"], subtype=form["subtype"], format=form["format"])
    result = enhance(path, "-o", "clean.wav")
    assert result.exit_code == 0, result.output
    assert len(read(tmp_path / "clean.wav")) == 32000
    words = ["enrol", path, "-o", tmp_path / "me.safetensors", "--model", kept / "model"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path}/me.safetensors: a voice from 2.0 s of recording\n"


def test_an_enrolled_voice_is_that_of_the_library(kept, tmp_path):
    pytest.importorskip("soundfile")
    path = tmp_path / "me.safetensors"
    words = ["enrol", kept / "noisy.wav", "-o", path, "--model", kept / "model"]
    assert CliRunner().invoke(main, [str(word) for word in words]).exit_code == 0
    enhancer = toy(window=512)
    found = enrolment.load(path, enhancer)
    ours = enrolment.enrol(enhancer, heard(pcm(WHOLE)))
    assert all(torch.equal(found[name], ours[name]) for name in ours)


def test_a_file_is_read_in_blocks_however_long_it_is(enhance, kept, wanted, tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    taken, real = [], soundfile.SoundFile.read

    def spy(self, frames=-1, **more):
        taken.append(frames)
        return real(self, frames, **more)

    monkeypatch.setattr(audio, "BLOCK", 5000)
    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    assert enhance(kept / "noisy.wav", "-o", "clean.wav").exit_code == 0
    # Once for its faults and once to be enhanced, the last time each with nothing left.
    assert taken == [5000] * 2 * (len(WHOLE) // 5000 + 2)
    close(read(tmp_path / "clean.wav"), wanted)


# Pipes ------------------------------------------------------------------------------------------


def test_a_pipe_is_enhanced(enhance, wanted):
    # Half a sample at the end is none.
    result = enhance("-", given=pcm(WHOLE) + b"\x07")
    assert result.exit_code == 0, result.output
    close(heard(result.stdout_bytes), wanted)


def test_a_pipe_into_a_file(enhance, wanted, tmp_path):
    assert enhance("-", "-o", "clean.wav", given=pcm(WHOLE)).exit_code == 0
    close(read(tmp_path / "clean.wav"), wanted)


def test_the_meter(enhance):
    result = enhance("-", "--meter", given=pcm(WHOLE))
    *_, line, _, _ = result.stderr.splitlines()
    assert line.startswith("     3.0 s  in #############.......  -20 dB  out #")
    assert "dB" not in enhance("-", given=pcm(WHOLE)).stderr


def process(kept: Path, *words: object) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "pared", "enhance", "-", "-e", kept / "me.safetensors"]
    return subprocess.Popen(
        [str(word) for word in [*line, "--model", kept / "model", *words]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def arrived(running: subprocess.Popen[bytes], path: Path, samples: int) -> Path:
    """Waits until a WAV file holds that many samples."""
    while not path.exists() or path.stat().st_size < 44 + 2 * samples:
        time.sleep(0.05)
        assert running.poll() is None
    return path


def test_what_was_enhanced_before_the_pipe_closed_is_there(kept, wanted, tmp_path):
    running = process(kept, "-o", tmp_path / "clean.wav")
    running.stdin.write(pcm(WHOLE)[:40001])
    running.stdin.flush()
    path = arrived(running, tmp_path / "clean.wav", 19000)
    # In mid-stream the file is whole already.
    close(read(path), wanted[: len(read(path))])
    _, told = running.communicate(timeout=60)
    assert running.returncode == 0, told
    assert len(read(path)) == 20000


def test_a_reader_that_goes_away_ends_it_quietly(kept):
    running = process(kept)
    running.stdout.close()
    _, told = running.communicate(pcm(WHOLE), timeout=60)
    assert (running.returncode, told) == (1, b"")


def test_interrupted_it_writes_what_it_has(kept, tmp_path):
    with ctrl_c():
        running = process(kept, "-o", tmp_path / "clean.wav")
    # Whole hops: once all but the last came out, all were taken in.
    running.stdin.write(pcm(WHOLE[: 78 * 256]))
    running.stdin.flush()
    path = arrived(running, tmp_path / "clean.wav", 77 * 256)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert len(read(path)) == 78 * 256
    assert b"enhanced with a real-time factor" in running.stderr.read()


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_at_work_it_loses_nothing_unless_it_is_again(kept, times):
    """Ctrl-C while pieces are written, with more of them behind."""
    enhancer, got = toy(window=512), []
    voice = enrolment.load(kept / "me.safetensors", enhancer)

    def write(samples):
        got.append(samples)
        if len(got) <= times:
            os.kill(os.getpid(), signal.SIGINT)

    again = pytest.raises(KeyboardInterrupt) if times > 1 else nullcontext()
    with ctrl_c(), again:
        pieces = WHOLE.split(5000)
        assert not sound.enhance(Stream(enhancer, voice), pieces, write, sound.Meter(False))
    assert sum(map(len, got)) == 5000


def test_trouble_in_mid_stream_leaves_what_came_before(wanted):
    enhancer, got = toy(window=512), []
    voice = enrolment.enrol(enhancer, noise(32000))

    def recording():
        yield WHOLE[:5000]
        raise InputError("the microphone is gone.")

    with pytest.raises(InputError, match="the microphone is gone"):
        sound.enhance(Stream(enhancer, voice), recording(), got.append, sound.Meter(False))
    assert sum(map(len, got)) == 5000


def test_a_full_disk_is_said(kept, tmp_path, enhance):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / "full.wav").symlink_to("/dev/full")
    result = enhance("-", "-o", "full.wav", given=pcm(WHOLE))
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr


# A microphone -----------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    """A stand-in for sounddevice: a microphone that gives the recording, then Ctrl-C."""
    played: list[bytes] = []

    class Stream:
        def __init__(self, samplerate, blocksize, channels, dtype):
            assert (samplerate, channels, dtype) == (16000, 1, "int16")
            self.taken = 0

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def read(self, frames):
            start, self.taken = self.taken, self.taken + frames
            if self.taken > len(WHOLE):
                raise KeyboardInterrupt
            return memoryview(pcm(WHOLE[start : self.taken])), False

        def write(self, data):
            played.append(data)

    module = types.SimpleNamespace(
        RawInputStream=Stream, RawOutputStream=Stream, PortAudioError=RuntimeError
    )
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return types.SimpleNamespace(module=module, played=played)


def test_a_microphone_is_enhanced_until_control_c(device, enhance, wanted, tmp_path):
    result = enhance("mic", "-o", "clean.wav")
    assert result.exit_code == 0, result.output
    got = read(tmp_path / "clean.wav")
    assert len(got) == len(WHOLE) // 256 * 256
    close(got[:-512], wanted[: len(got) - 512])


def test_a_loudspeaker_plays_it(device, kept, wanted, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with sound.written(None, "mic") as write:
        write(wanted)
    assert b"".join(device.played) == pcm(wanted)


def test_enrolling_listens_for_a_while(device, kept, tmp_path):
    path = tmp_path / "me.safetensors"
    words = ["enrol", "mic", "--seconds", 2, "-o", path, "--model", kept / "model"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.stdout == f"{path}: a voice from 2.0 s of recording\n", result.output


def test_no_microphone(device, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Error querying device -1")

    monkeypatch.setattr(device.module, "RawInputStream", broken)
    with pytest.raises(InputError, match="the microphone can't be used"):
        list(sound.pieces("mic"))
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(InputError, match="a microphone needs the package sounddevice"):
        list(sound.pieces("mic"))


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, part",
    [
        (["enhance", "x.wav", "-e", "me", "-o", "x.mp3"], "x.mp3 isn't named .wav"),
        (["enhance", "-", "-e", "me", "--json"], "--json prints where the sound would go"),
        (["enhance", "-", "-e", "me", "--model", "nowhere"], "there is no folder 'nowhere'"),
        (["enhance", "-", "-e", "me", "--model", "house:nobody"], "no house model 'house:nobody'"),
        (["enrol", "x.wav", "-o", "me.wav"], "me.wav isn't named .safetensors"),
        (["enrol", "x.wav", "--seconds", "3", "-o", "me.safetensors"], "--seconds is for the mic"),
        (["convert", "toy:dit", "--with", "streaming-pse", "-o", "x"], "is a model of its own"),
        (["enrol", "gone.wav", "-o", "me.safetensors"], "'gone.wav' doesn't exist"),
    ],
)
def test_refusals(refused, words, part):
    pytest.importorskip("soundfile")
    assert part in refused(*words)


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "is empty"),
        (b"not a sound", "no WAV"),
        ("short", "has 0.50 s; it needs at least 1"),
        ("silent", "is silent"),
        ("cut", "is cut off"),
        ("nan", "NaN"),
    ],
)
def test_recordings_that_cannot_be_enrolled(kept, tmp_path, monkeypatch, content, part):
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("x.wav").write_bytes(content)
    else:
        samples = noise(8000 if content == "short" else 32000).numpy()
        samples *= content != "silent"
        samples[100] = float("nan") if content == "nan" else samples[100]
        soundfile.write("x.wav", samples, 16000, subtype="FLOAT")
        if content == "cut":
            os.truncate("x.wav", 50000)
    words = ["enrol", "x.wav", "-o", "me.safetensors", "--model", str(kept / "model")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and part in result.stderr, result.output
    assert len(result.stderr.splitlines()) == 1
    assert not Path("me.safetensors").exists()


def test_what_there_is_to_know_of_it():
    told = CliRunner().invoke(main, ["methods", "streaming-pse"]).stdout
    assert "effect    a model of its own, to be trained" in told
    assert "serves    no other model" in told
    assert "magnitude | complex" in told


def test_a_sound_file_in_the_pipe(enhance, kept):
    result = enhance("-", given=(kept / "noisy.wav").read_bytes())
    assert result.exit_code == 2
    assert "the pipe carries a sound file; give its name instead" in result.stderr


def test_an_empty_pipe(enhance):
    result = enhance("-", given=b"")
    assert (result.exit_code, result.stdout_bytes) == (2, b"")
    assert "the pipe closed before a sample came" in result.stderr


def test_reading_and_overwriting_the_same_file(enhance, kept, tmp_path):
    audio.write(tmp_path / "a.wav", WHOLE)
    before = (tmp_path / "a.wav").read_bytes()
    result = enhance("a.wav", "-o", "a.wav")
    assert result.exit_code == 2 and "would be read and overwritten" in result.stderr
    assert (tmp_path / "a.wav").read_bytes() == before


def test_a_voice_of_another_model(enhance, kept):
    enhancer = toy(window=512, layers=1)
    enrolment.save(kept / "other.safetensors", enhancer, enrolment.enrol(enhancer, noise(32000)))
    result = enhance("-", "-o", "clean.wav", given=pcm(WHOLE), voice="other.safetensors")
    assert result.exit_code == 2 and "was made by another model" in result.stderr
