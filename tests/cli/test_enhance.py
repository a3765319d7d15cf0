"""`pared enhance`: files, pipes, and all that can go wrong."""

import errno
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pared.cli import main, sound
from pared.cli.meter import Meter
from pared.cli.sound_card import SoundCard
from pared.errors import InputError
from pared.speech.streaming_pse import enrolment
from pared.speech.streaming_pse.method_checks import noise, toy
from pared.speech.streaming_pse.stream import Stream
from pared.worlds.speech import audio
from tests.cli import sounds
from tests.cli.sounds import WHOLE, close, heard, pcm, read
from tests.signals import ctrl_c

# Files ------------------------------------------------------------------------------------------


def test_a_file_is_enhanced(enhance, kept, wanted, tmp_path):
    result = enhance(kept / "noisy.wav", "-o", "clean.wav")
    assert result.exit_code == 0, result.output
    close(read(tmp_path / "clean.wav"), wanted)
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("clean.wav: 3.0 s enhanced with a real-time factor of ")
    assert second.startswith("latency: 32 ms by construction; each hop of 16 ms took ")
    assert "at the 50th percentile" in second and "at worst" in second


def test_the_report_as_json(enhance, kept):
    report = json.loads(enhance(kept / "noisy.wav", "-o", "clean.wav", "--json").stdout)
    assert report["output"] == "clean.wav"
    assert report["hops"] == 189 and report["latency"] == 0.032 and report["threads"] == 1
    assert 0 < report["median"] <= report["p99"] <= report["worst"]
    assert (report["device_latency"], report["lost"]) == ({}, 0)


@pytest.mark.parametrize("words, count", [([], 1), (["--threads", 2], 2)])
def test_it_computes_with_as_many_threads_as_asked_for(enhance, monkeypatch, words, count):
    real, seen = sound.enhance, []

    def spy(*arguments):
        seen.append(torch.get_num_threads())
        return real(*arguments)

    monkeypatch.setattr(sound, "enhance", spy)
    torch.set_num_threads(3)
    result = enhance("-", "-o", "clean.wav", "--json", *words, given=pcm(WHOLE[:4000]))
    assert seen == [count] and json.loads(result.stdout)["threads"] == count


@pytest.mark.parametrize("form", sounds.FORMS, ids=lambda form: form["format"] + form["subtype"])
def test_other_forms_are_converted(enhance, enhanced, tmp_path, form):
    recording = sounds.stored(tmp_path, form)
    result = enhance(recording, "-o", "clean.wav")
    assert result.exit_code == 0, result.output
    close(read(tmp_path / "clean.wav"), enhanced(recording))


def test_a_file_is_read_in_blocks_however_long_it_is(enhance, kept, wanted, tmp_path, monkeypatch):
    taken, real = [], sounds.soundfile.SoundFile.read

    def spy(self, frames=-1, **more):
        taken.append(frames)
        return real(self, frames, **more)

    monkeypatch.setattr(audio, "BLOCK", 5000)
    monkeypatch.setattr(sounds.soundfile.SoundFile, "read", spy)
    assert enhance(kept / "noisy.wav", "-o", "clean.wav").exit_code == 0
    # Once for its faults and once to be enhanced, the last time each with nothing left.
    assert taken == [5000] * 2 * (len(WHOLE) // 5000 + 2)
    close(read(tmp_path / "clean.wav"), wanted)


def test_a_new_folder_is_made(enhance, kept, wanted, tmp_path):
    result = enhance(kept / "noisy.wav", "-o", "calls/today/clean.wav")
    assert result.exit_code == 0, result.output
    close(read(tmp_path / "calls" / "today" / "clean.wav"), wanted)


def test_a_file_is_written_beside_the_source(enhance, in_terminal, kept, wanted, tmp_path):
    (tmp_path / "calls").mkdir()
    audio.write(tmp_path / "calls" / "noisy.wav", WHOLE)
    known = ["-e", kept / "me.safetensors", "--model", kept / "model"]
    assert in_terminal("enhance", "calls/noisy.wav", *known, "--json") == 0
    close(read(tmp_path / "calls" / "noisy-enhanced.wav"), wanted)
    assert len(list((tmp_path / "calls").iterdir())) == 2
    (tmp_path / "calls" / "noisy-enhanced.wav").unlink()
    assert not enhance("calls/noisy.wav").stdout_bytes
    close(read(tmp_path / "calls" / "noisy-enhanced.wav"), wanted)


def test_the_source_stays_there_too(in_terminal, kept, tmp_path):
    audio.write(tmp_path / "a.wav", WHOLE)
    (tmp_path / "a-enhanced.wav").symlink_to("a.wav")
    before = (tmp_path / "a.wav").read_bytes()
    with pytest.raises(InputError, match=r"a-enhanced\.wav would be read and overwritten"):
        in_terminal("enhance", "a.wav", "-e", kept / "me.safetensors", "--model", kept / "model")
    assert (tmp_path / "a.wav").read_bytes() == before


@pytest.mark.parametrize("words", [["-"], ["a.wav", "-o", "-"], ["mic", "-o", "-"]], ids=" ".join)
def test_in_a_terminal_a_pipe_needs_a_place(in_terminal, words):
    with pytest.raises(InputError, match=r"there is nowhere to write; give -o FILE\.wav"):
        in_terminal("enhance", *words)


# Pipes ------------------------------------------------------------------------------------------


def test_a_pipe_is_enhanced(enhance, wanted):
    # Half a sample at the end is none.
    result = enhance("-", given=pcm(WHOLE) + b"\x07")
    assert result.exit_code == 0, result.output
    close(heard(result.stdout_bytes), wanted)


def test_a_file_into_a_pipe(enhance, kept, wanted, tmp_path):
    result = enhance(kept / "noisy.wav", "-o", "-")
    close(heard(result.stdout_bytes), wanted)
    assert result.stderr.startswith("3.0 s enhanced") and not list(tmp_path.iterdir())


def test_a_pipe_into_a_file(enhance, wanted, tmp_path):
    assert enhance("-", "-o", "clean.wav", given=pcm(WHOLE)).exit_code == 0
    close(read(tmp_path / "clean.wav"), wanted)


def test_the_meter(enhance):
    result = enhance("-", "--meter", given=pcm(WHOLE))
    *_, line, _, _ = result.stderr.splitlines()
    assert line.startswith("     3.0 s  in #############.......  -20 dB  out #")
    assert "dB" not in enhance("-", given=pcm(WHOLE)).stderr


def process(kept: Path, *words: object, **more: object) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "pared", "enhance", "-", "-e", kept / "me.safetensors"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [str(word) for word in [*line, "--model", kept / "model", *words]]
    return subprocess.Popen(words, **(pipes | more))


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


def test_a_disk_that_fills_up_behind_the_pipe(kept, wanted, tmp_path):
    """What fitted is there, and one sentence says what didn't."""
    resource = pytest.importorskip("resource")

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20001, 20001))

    path = tmp_path / "enhanced.raw"
    with path.open("wb") as file:
        running = process(kept, "--meter", stdout=file, preexec_fn=bounded)
        _, told = running.communicate(pcm(WHOLE), timeout=60)
    assert running.returncode == 2
    *_, last = told.decode().splitlines()
    assert last == (
        "pared: the output can't be written any further (File too large); what came before is "
        "there."
    )
    assert path.stat().st_size == 20001
    close(heard(path.read_bytes()[:20000]), wanted[:10000])


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
        assert not sound.enhance(Stream(enhancer, voice), pieces, write, Meter(False))
    assert sum(map(len, got)) == 5000


def test_trouble_in_mid_stream_leaves_what_came_before():
    enhancer, got = toy(window=512), []
    voice = enrolment.enrol(enhancer, noise(32000))

    def recording():
        yield WHOLE[:5000]
        raise InputError("the microphone is gone.")

    with pytest.raises(InputError, match="the microphone is gone"):
        sound.enhance(Stream(enhancer, voice), recording(), got.append, Meter(False))
    assert sum(map(len, got)) == 5000


def test_a_full_disk_is_said(tmp_path, enhance):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / "full.wav").symlink_to("/dev/full")
    result = enhance("-", "-o", "full.wav", given=pcm(WHOLE))
    assert result.exit_code == 2
    assert result.stderr == (
        "pared: full.wav can't be written any further (No space left on device); what came before "
        "is there.\n"
    )


def test_two_commands_never_write_one_file(enhance, kept, wanted, tmp_path):
    pytest.importorskip("fcntl")
    other = sound.WavFile(tmp_path / "clean.wav")
    other.append(pcm(WHOLE[:1000]))
    before = (tmp_path / "clean.wav").read_bytes()
    result = enhance(kept / "noisy.wav", "-o", "clean.wav")
    assert (result.exit_code, result.stderr) == (
        2,
        "pared: clean.wav is being written by another command; wait for its end, or give another "
        "name.\n",
    )
    assert (tmp_path / "clean.wav").read_bytes() == before
    other.close()
    assert enhance(kept / "noisy.wav", "-o", "clean.wav").exit_code == 0
    close(read(tmp_path / "clean.wav"), wanted)


def test_a_shorter_recording_leaves_nothing_of_a_longer_one(enhance, kept, tmp_path):
    (tmp_path / "clean.wav").write_bytes(bytes(10**6))
    assert enhance(kept / "noisy.wav", "-o", "clean.wav").exit_code == 0
    assert (tmp_path / "clean.wav").stat().st_size == 44 + 2 * len(WHOLE)


def test_beyond_four_gigabytes_the_header_tells_the_most_it_can():
    for size, told in ((2000, 2000), (2**32 - 36, 2**32 - 36), (2**32 + 2000, 2**32 - 1)):
        head = sound._head(size)
        assert len(head) == 44 and struct.unpack("<I", head[40:]) == (told,)
        assert struct.unpack("<I", head[4:8]) == (min(told + 36, 2**32 - 1),)


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault, part", sounds.FAULTS)
def test_recordings_that_cannot_be_enhanced(refused, kept, tmp_path, fault, part):
    sounds.faulty(tmp_path / "x.wav", fault)
    words = ["x.wav", "-e", kept / "me.safetensors", "--model", kept / "model", "-o", "clean.wav"]
    assert part in refused("enhance", *words)


@pytest.mark.parametrize(
    "words, part",
    [
        (["-", "-o", "x.mp3"], "x.mp3 isn't named .wav; give the name of a .wav file"),
        (["-", "-o", "x.wav"], "x.wav is a folder; give the name of a file, e.g. voice.wav"),
        (["-", "--json"], "--json prints where the sound would go"),
        (["-"], "no enrolment 'voice.safetensors'; run `pared enrol me.wav` first, or give"),
        (["-", "-e", "gone"], "no enrolment 'gone'; run `pared enrol me.wav` first, or give"),
        (["-", "-e", "me", "--model", "nowhere"], "there is no model 'nowhere'"),
        (["-", "-e", "me", "--model", "house:nobody"], "no house model 'house:nobody'"),
        (["-", "-e", "me", "--model", "a-lab/a-model"], "a-lab/a-model can't be had: it isn't in"),
    ],
)
def test_refusals(refused, tmp_path, words, part):
    (tmp_path / "me").touch()
    (tmp_path / "x.wav").mkdir()
    assert part in refused("enhance", *words)


def test_it_converts_no_other_model(refused):
    told = refused("convert", "toy:dit", "--with", "streaming-pse", "-o", "x")
    assert "is a model of its own" in told


def test_what_there_is_to_know_of_it():
    told = CliRunner().invoke(main, ["methods", "streaming-pse"]).stdout
    assert "effect    a model of its own, to be trained" in told
    assert "serves    no other model" in told
    assert "magnitude | complex" in told


def test_a_sound_file_in_the_pipe(enhance, kept):
    result = enhance("-", given=(kept / "noisy.wav").read_bytes())
    assert result.exit_code == 2
    assert "the pipe carries a sound file; give its name instead" in result.stderr


@pytest.mark.parametrize("given", [b"", b"\x07"], ids=["nothing", "half a sample"])
def test_an_empty_pipe(enhance, tmp_path, given):
    (tmp_path / "clean.wav").write_text("of another day")
    result = enhance("-", "-o", "clean.wav", given=given)
    assert (result.exit_code, result.stdout_bytes) == (2, b"")
    assert "the pipe closed before a sample came" in result.stderr
    assert (tmp_path / "clean.wav").read_text() == "of another day"


def test_a_pipe_that_breaks(monkeypatch):
    class Broken(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Broken())))
    with pytest.raises(InputError, match=r"the pipe can't be read \(Input/output error\); pipe 16"):
        list(sound.pieces("-", SoundCard()))


def test_reading_and_overwriting_the_same_file(enhance, tmp_path):
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
