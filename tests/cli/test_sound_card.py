"""Microphone and loudspeaker of `pared enrol` and `pared enhance`, with a stand-in for both."""

import json
import sys
import types

import pytest

from pared.cli import sound
from pared.cli.sound_card import SoundCard
from pared.errors import InputError
from pared.speech.streaming_pse.method_checks import toy
from tests.cli.sounds import WHOLE, close, heard, pcm, read


class PortAudioError(Exception):
    """What sounddevice raises."""


class Card:
    """Stands in for sounddevice: a microphone that gives the recording, then Ctrl-C.

    Attributes:
        played: what the loudspeaker got.
        started: devices that were, in this order.
        full: whether sound is lost before the first hop and before the third.
        microphone_goes, loudspeaker_goes: after how many hops each is pulled out.
    """

    def __init__(self) -> None:
        self.played: list[bytes] = []
        self.started: list[str] = []
        self.full = False
        self.microphone_goes = self.loudspeaker_goes = 10**9

    def module(self) -> types.SimpleNamespace:
        card = self

        class Stream:
            name, latency = "", 0.0

            def __init__(self, samplerate, blocksize, channels, dtype, latency):
                given = (samplerate, blocksize, channels, dtype, latency)
                assert given == (16000, 256, 1, "int16", "low")
                self.hops = 0

            def __enter__(self):
                card.started.append(self.name)
                return self

            def __exit__(self, *exception):
                pass

        class Microphone(Stream):
            name, latency = "microphone", 0.0087

            def read(self, frames):
                start, self.hops = 256 * self.hops, self.hops + 1
                if self.hops > card.microphone_goes:
                    raise PortAudioError("Unanticipated host error [PaErrorCode -9999]")
                if start + frames > len(WHOLE):
                    raise KeyboardInterrupt
                lost = card.full and self.hops in (1, 3)
                return memoryview(pcm(WHOLE[start : start + frames])), lost

        class Loudspeaker(Stream):
            name, latency = "loudspeaker", 0.012

            def write(self, data):
                self.hops += 1
                if self.hops > card.loudspeaker_goes:
                    raise PortAudioError("Unanticipated host error [PaErrorCode -9999]")
                card.played.append(data)
                return False

        return types.SimpleNamespace(
            RawInputStream=Microphone, RawOutputStream=Loudspeaker, PortAudioError=PortAudioError
        )


@pytest.fixture
def card(monkeypatch) -> Card:
    found = Card()
    monkeypatch.setitem(sys.modules, "sounddevice", found.module())
    return found


def test_a_microphone_is_enhanced_until_control_c(card, enhance, wanted, tmp_path):
    result = enhance("mic", "-o", "clean.wav")
    assert result.exit_code == 0, result.output
    got = read(tmp_path / "clean.wav")
    assert len(got) == len(WHOLE) // 256 * 256
    close(got[:-512], wanted[: len(got) - 512])
    begin, first, _, last = result.stderr.splitlines()
    assert begin == "listening until Ctrl-C ..."
    assert first.startswith("clean.wav: 3.0 s enhanced")
    assert last == "devices: 8.7 ms of the microphone come on top; sound was lost 0 times"


def test_lost_sound_is_told(card, enhance, run, kept):
    card.full = True
    assert enhance("mic", "-o", "clean.wav").stderr.endswith("sound was lost 2 times\n")
    report = json.loads(enhance("mic", "-o", "clean.wav", "--json").stdout)
    assert (report["device_latency"], report["lost"]) == ({"microphone": 0.0087}, 2)
    told = run("enrol", "mic", "--seconds", 2, "--model", kept / "model").stdout
    assert told.endswith("a voice from 2.0 s of recording, in which sound was lost 2 times\n")


def test_a_loudspeaker_plays_it(card, in_terminal, kept, wanted, capsys):
    words = ["-e", kept / "me.safetensors", "--model", kept / "model"]
    assert in_terminal("enhance", "mic", *words) == 0
    got = heard(b"".join(card.played))
    assert len(got) == len(WHOLE) // 256 * 256
    close(got[:-512], wanted[: len(got) - 512])
    assert card.started == ["loudspeaker", "microphone"]
    assert (
        "devices: 12.0 ms of the loudspeaker and 8.7 ms of the microphone come on top; sound was "
        "lost 0 times\n"
    ) in capsys.readouterr().err


def test_enrolling_listens_for_a_while(card, run, kept):
    result = run("enrol", "mic", "--seconds", 2, "--model", kept / "model")
    assert result.stdout == "voice.safetensors: a voice from 2.0 s of recording\n", result.output
    assert result.stderr == "listening for 2 s ...\n"
    assert "listening for 8 s ..." in run("enrol", "mic", "--model", kept / "model").stderr


@pytest.mark.parametrize("command", ["enrol", "enhance"])
def test_the_model_is_there_before_anybody_speaks(card, run, kept, command, monkeypatch):
    real = sound.enhancer_of

    def spy(name):
        found = real(name)
        card.started.append("model")
        return found

    monkeypatch.setattr(sound, "enhancer_of", spy)
    words = ["-e", kept / "me.safetensors"] if command == "enhance" else ["--seconds", 1]
    assert run(command, "mic", *words, "--model", kept / "model").exit_code == 0
    assert card.started == ["model", "microphone"]


@pytest.mark.parametrize("model", ["nowhere", "toy:dit", "vector"])
def test_nobody_speaks_for_a_wrong_model(card, refused, tmp_path, model):
    toy(conditioning="static_vector").save_pretrained(tmp_path / "vector")
    refused("enrol", "mic", "--model", model)
    assert card.started == []


def test_a_microphone_that_is_pulled_out(card, enhance, tmp_path):
    card.microphone_goes = 100
    result = enhance("mic", "-o", "clean.wav")
    assert result.exit_code == 2
    assert "the microphone can't be used (Unanticipated host error" in result.stderr
    assert len(read(tmp_path / "clean.wav")) == 100 * 256


def test_a_loudspeaker_that_is_pulled_out(card, in_terminal, kept):
    card.loudspeaker_goes = 100
    with pytest.raises(InputError, match=r"the loudspeaker can't be used \(Unanticipated host"):
        in_terminal("enhance", "mic", "-e", kept / "me.safetensors", "--model", kept / "model")
    # The first hop of output comes with the second of input.
    assert len(b"".join(card.played)) == 2 * 99 * 256


def test_no_microphone(card, monkeypatch):
    def broken(*_, **__):
        raise PortAudioError("Error querying device -1")

    monkeypatch.setattr(sys.modules["sounddevice"], "RawInputStream", broken)
    with pytest.raises(InputError, match="the microphone can't be used"):
        list(sound.pieces("mic", SoundCard()))


def test_no_package(enhance, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    result = enhance("mic", "-o", "clean.wav")
    assert result.exit_code == 2
    assert "a microphone needs the package sounddevice" in result.stderr
