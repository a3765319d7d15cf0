"""`pared enrol`: recordings in, a voice out, and all that can go wrong."""

from pathlib import Path

import pytest
import torch

from pared.speech.streaming_pse import enrolment
from pared.speech.streaming_pse.method_checks import toy
from pared.worlds.speech import audio
from tests.cli import sounds


@pytest.fixture
def enrol(run, kept):
    """Runs `pared enrol` with the model in an empty folder."""
    return lambda *words: run("enrol", *words, "--model", kept / "model")


def test_an_enrolled_voice_is_that_of_the_library(enrol, kept, tmp_path):
    result = enrol(kept / "noisy.wav")
    assert result.exit_code == 0, result.output
    assert result.stdout == "voice.safetensors: a voice from 3.0 s of recording\n"
    enhancer = toy(window=512)
    found = enrolment.load(tmp_path / "voice.safetensors", enhancer)
    ours = enrolment.enrol(enhancer, audio.read(kept / "noisy.wav"))
    assert all(torch.equal(found[name], ours[name]) for name in ours)


@pytest.mark.parametrize("form", sounds.FORMS, ids=lambda form: form["format"] + form["subtype"])
def test_other_forms_are_converted(enrol, tmp_path, form):
    recording = sounds.stored(tmp_path, form)
    result = enrol(recording, "-o", "me.safetensors")
    assert result.exit_code == 0, result.output
    assert result.stdout == "me.safetensors: a voice from 2.0 s of recording\n"
    enhancer = toy(window=512)
    found = enrolment.load(tmp_path / "me.safetensors", enhancer)
    ours = enrolment.enrol(enhancer, audio.read(recording))
    # A file is resampled in blocks, and the recording here as a whole: rounding of sums over other
    # numbers of rows, through large weights.
    assert all(torch.allclose(found[n], ours[n], rtol=1e-3, atol=1e-3) for n in ours)


def test_no_more_is_read_than_is_listened_to(enrol, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(enrolment, "LONGEST", 2.0)
    taken = []

    def pieces(*_):
        for piece in audio.read(kept / "noisy.wav").split(5000):
            taken.append(len(piece))
            yield piece

    monkeypatch.setattr("pared.cli.sound.pieces", pieces)
    told = enrol("x.wav").stdout
    assert told == "voice.safetensors: a voice from 2.0 s of recording\n" and sum(taken) == 35000
    enhancer = toy(window=512)
    found = enrolment.load(tmp_path / "voice.safetensors", enhancer)
    ours = enrolment.enrol(enhancer, audio.read(kept / "noisy.wav"))
    assert all(torch.equal(found[name], ours[name]) for name in ours)


def test_a_new_folder_is_made(enrol, kept, tmp_path):
    assert enrol(kept / "noisy.wav", "-o", "voices/new/me.safetensors").exit_code == 0
    assert (tmp_path / "voices" / "new" / "me.safetensors").is_file()


@pytest.mark.parametrize(
    "fault, part",
    [*sounds.FAULTS, ("short", "the enrolment has 0.50 s; it needs at least 1")],
)
def test_recordings_that_cannot_be_enrolled(refused, kept, tmp_path, fault, part):
    sounds.faulty(tmp_path / "x.wav", fault)
    assert part in refused("enrol", "x.wav", "--model", kept / "model")


@pytest.mark.parametrize(
    "words, part",
    [
        (["x.wav", "-o", "me.wav"], "me.wav isn't named .safetensors; give the name of a"),
        (["x.wav", "-o", "me.safetensors"], "me.safetensors is a folder; give the name of a"),
        (["x.wav", "--seconds", "3"], "--seconds is for the microphone"),
        (["-"], "the pipe closed before a sample came"),
        (["noisy.wav", "--model", "nowhere"], "there is no model 'nowhere'"),
        (["noisy.wav", "--model", "house:nobody"], "no house model 'house:nobody'"),
        (["noisy.wav", "--model", "toy:dit"], "is a configuration with random weights"),
        (["noisy.wav", "--model", "a-lab/a-model"], "a-lab/a-model can't be had: it isn't in this"),
    ],
)
def test_refusals(refused, kept, tmp_path, words, part):
    (tmp_path / "me.safetensors").mkdir()
    (tmp_path / "noisy.wav").symlink_to(kept / "noisy.wav")
    given = words if "--model" in words else [*words, "--model", kept / "model"]
    assert part in refused("enrol", *given)


def test_a_model_that_needs_another_kind_of_enrolment(refused, kept, tmp_path):
    toy(conditioning="static_vector").save_pretrained(tmp_path / "model")
    told = refused("enrol", kept / "noisy.wav", "--model", "model")
    assert "takes a speaker's embedding from another encoder" in told


def test_a_model_that_keeps_all_voices_says_so(run, kept, tmp_path):
    toy(conditioning="none").save_pretrained(tmp_path / "model")
    told = run("enrol", kept / "noisy.wav", "--model", "model").stdout
    assert told.startswith("voice.safetensors: no voice, as this model (conditioning=none) keeps")


def test_the_two_lines_that_matter(run, in_terminal, kept, enhanced, tmp_path, monkeypatch, capsys):
    """`pared enrol me.wav` and `pared enhance noisy.wav`, with the model that they take."""
    house = tmp_path / "house"
    house.mkdir()
    (house / "streaming-pse").symlink_to(kept / "model")
    monkeypatch.setattr("pared.worlds.house.ROOT", house)
    audio.write(tmp_path / "me.wav", sounds.noise(32000))
    audio.write(tmp_path / "noisy.wav", sounds.WHOLE)
    assert run("enrol", "me.wav").exit_code == 0
    before = Path("noisy.wav").read_bytes()
    assert in_terminal("enhance", "noisy.wav") == 0
    told = capsys.readouterr()
    assert told.err.startswith("noisy-enhanced.wav: 3.0 s enhanced with a real-time factor of")
    assert told.out == "" and Path("noisy.wav").read_bytes() == before
    ours = enrolment.load("voice.safetensors", toy(window=512))
    with torch.no_grad():
        wanted = toy(window=512).enhance(audio.read("noisy.wav")[None], ours)[0]
    sounds.close(sounds.read(tmp_path / "noisy-enhanced.wav"), wanted)
