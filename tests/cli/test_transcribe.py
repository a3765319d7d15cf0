"""`pared transcribe`: recordings in, words and times out, and all that can go wrong."""

import json
import shutil
from pathlib import Path

import pytest

from pared.speech.recognition import load, transcribe
from pared.worlds.speech import audio
from tests.cli import sounds
from tests.cli.sounds import soundfile
from tests.speech import recognisers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A recogniser of random weights, and recordings."""
    place = tmp_path_factory.mktemp("transcribe")
    recognisers.conformer().save(place / "model")
    audio.write(place / "short.wav", recognisers.noise(24000))
    audio.write(place / "long.wav", recognisers.noise(30 * 16000, seed=1))
    stereo = recognisers.noise(2 * 44100, seed=2).view(2, -1).T.numpy()
    soundfile.write(place / "stereo.flac", stereo, 44100, subtype="PCM_24")
    return place


@pytest.fixture
def written(run, folder):
    """Runs `pared transcribe` with the model; names of recordings become their paths."""

    def invoke(*words):
        recordings = [folder / word if (folder / str(word)).is_file() else word for word in words]
        return run("transcribe", *recordings, "--model", folder / "model")

    return invoke


def heard(folder, name, beam=1):
    pieces = audio.read_blocks(folder / name)
    return list(transcribe(load(folder / "model"), pieces, beam))


@pytest.mark.parametrize("name", ["short.wav", "long.wav", "stereo.flac"])
def test_a_recording_is_written_down(written, folder, name):
    result = written(name)
    assert result.exit_code == 0, result.output
    words = heard(folder, name)
    assert words and result.stdout == " ".join(word.text for word in words) + "\n"
    assert "Loading weights" not in result.stderr


def test_several_recordings(written, folder):
    result = written("short.wav", "stereo.flac")
    lines = [
        f"{folder / name}: {' '.join(word.text for word in heard(folder, name))}"
        for name in ("short.wav", "stereo.flac")
    ]
    assert result.stdout.splitlines() == lines


def test_words_and_times_as_json(written, folder):
    first, second = json.loads(written("short.wav", "stereo.flac", "--json").stdout)
    assert first["file"].endswith("short.wav") and second["file"].endswith("stereo.flac")
    assert (first["seconds"], second["seconds"]) == (1.5, 1.0)
    assert first["real_time_factor"] > 0
    words = heard(folder, "short.wav")
    assert first["text"] == " ".join(word.text for word in words)
    assert first["words"] == [
        {"text": word.text, "start": word.start, "end": word.end} for word in words
    ]


def test_a_beam(written, folder):
    result = written("short.wav", "--beam", 4, "--device", "cpu")
    assert result.stdout == " ".join(word.text for word in heard(folder, "short.wav", 4)) + "\n"


def test_a_recording_in_which_nothing_is_said(run, tmp_path, folder):
    """A model that says nothing, since the blank is always likeliest."""
    recogniser = recognisers.conformer()
    recogniser.model.lm_head.bias.data[0] = 100.0
    recogniser.save(tmp_path / "mute")
    words = ["transcribe", folder / "short.wav", "--model", "mute"]
    assert run(*words).stdout == "\n"
    assert run(*words, folder / "short.wav").stdout == f"{folder / 'short.wav'}:\n" * 2
    (told,) = json.loads(run(*words, "--json").stdout)
    assert (told["text"], told["words"]) == ("", [])


def test_long_recordings_are_read_in_blocks(written, folder, monkeypatch):
    read = []
    real = soundfile.SoundFile.read

    def spy(self, frames=-1, **more):
        read.append(frames)
        return real(self, frames, **more)

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    assert written("long.wav").exit_code == 0
    assert set(read) == {audio.BLOCK}


@pytest.mark.parametrize("form", sounds.FORMS, ids=lambda form: form["format"] + form["subtype"])
def test_other_forms_are_converted(written, folder, tmp_path, form):
    recording = sounds.stored(tmp_path, form)
    words = transcribe(load(folder / "model"), audio.read_blocks(recording))
    assert written(recording).stdout == " ".join(word.text for word in words) + "\n"


def test_a_model_of_the_hub(run, folder, tmp_path, monkeypatch):
    """The hub's cache as huggingface_hub lays it out, with the recogniser in it."""
    cache = tmp_path / "cache" / "models--a-lab--a-model"
    shutil.copytree(folder / "model", cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run("transcribe", folder / "short.wav", "--model", "a-lab/a-model")
    assert result.stdout == " ".join(word.text for word in heard(folder, "short.wav")) + "\n"


@pytest.mark.parametrize("fault, part", sounds.FAULTS)
def test_recordings_that_cannot_be_written_down(refused, folder, tmp_path, fault, part):
    sounds.faulty(tmp_path / "x.wav", fault)
    # A good one before it isn't begun with.
    words = [folder / "short.wav", "x.wav", "--model", folder / "model"]
    assert part in refused("transcribe", *words)


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "missing argument 'FILE...'"),
        (["short.wav", "--beam", "0"], "0 is not in the range x>=1"),
        (["short.wav", "--device", "tpu"], "there is no device 'tpu' here"),
        (["short.wav", "--model", "nowhere"], "there is no model 'nowhere'"),
        (["short.wav", "--model", "house:nobody"], "no house model 'house:nobody'"),
        (["short.wav", "--model", "toy:dit"], "is a configuration with random weights"),
        (["short.wav", "--model", "a-lab/a-model"], "a-lab/a-model can't be had: it isn't in this"),
        (["short.wav", "--model", "whisper"], "holds a whisper, which is no CTC model"),
        (["short.wav", "--model", "bare"], "lacks the feature extractor or the tokenizer"),
    ],
)
def test_refusals(refused, folder, tmp_path, words, part):
    shutil.copy(folder / "short.wav", tmp_path)
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "config.json").write_text('{"model_type": "whisper"}')
    recognisers.conformer().model.save_pretrained(tmp_path / "bare")
    given = words if "--model" in words else [*words, "--model", folder / "model"]
    assert part in refused("transcribe", *given)
