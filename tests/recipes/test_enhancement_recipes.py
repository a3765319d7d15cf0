"""Recipes of kind mixtures: on voices made of tones, resumed, gone on from, refused."""

import json
from pathlib import Path

import pytest
import torch

from pared import recipe
from pared.errors import InputError
from pared.objectives.enhancement import si_sdr
from pared.speech.streaming_pse.model import load
from pared.speech.streaming_pse.training import data_of
from pared.training.data import generator_for
from tests.recipes.test_recognition_recipes import interruption
from tests.worlds.tones import Tones, write_librispeech

soundfile = pytest.importorskip("soundfile")

RECIPES = Path(__file__).parents[2] / "recipes"
MINI = RECIPES / "streaming-pse" / "mini.toml"
SHORT = [f"stages.0.training.{x}" for x in ("steps=3", "batch_size=2", "warmup=1", "log_every=1")]
SMALL = [f"model.config.{x}" for x in ("width=16", "layers=1")]
BRIEF = ["data.seconds=0.5", "data.mixing.enrolment_seconds=[0.5, 1.0]"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four talkers of three tones each, laid out as LibriSpeech is, and noises as in the DNS."""
    place, tones = tmp_path_factory.mktemp("corpus"), Tones()
    write_librispeech(place / "voices" / "train", tones)
    for n in range(len(tones)):
        for kind in ("clean", "noise"):
            (place / "dns" / kind).mkdir(parents=True, exist_ok=True)
            soundfile.write(place / "dns" / kind / f"{n}.wav", tones.waveform(n).numpy(), 16000)
    return place


def planned(corpus, *changes, path=MINI):
    source = f"data.source={corpus / 'voices'}"
    return recipe.read(path, [source, *SHORT, *SMALL, *BRIEF, *changes])


def test_what_is_trained_is_an_ordinary_folder(corpus, tmp_path):
    trained = recipe.run(planned(corpus), tmp_path)
    again = load(tmp_path / "model")
    assert again.settings == trained.settings and again.settings.enrolment_encoder == "frames"
    assert again.digest() == trained.digest() and not trained.training
    log = [json.loads(x) for x in (tmp_path / "stage-1" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    terms = {"signal", "silence", "magnitude", "spectrum", "suppression", "voice"}
    assert terms <= log[-1].keys()


def test_an_interrupted_training_goes_on_to_the_same_weights(corpus, tmp_path):
    plan = planned(corpus, "stages.0.training.ema=0.9")
    whole = recipe.run(plan, tmp_path / "whole")
    with interruption(at=1):
        assert recipe.run(plan, tmp_path / "parts") is None
    assert not (tmp_path / "parts" / "model").exists()
    assert recipe.run(plan, tmp_path / "parts").digest() == whole.digest()


def test_going_on_from_an_enhancer_with_recorded_noises(corpus, tmp_path):
    first = recipe.run(planned(corpus), tmp_path / "first")
    path = tmp_path / "on.toml"
    path.write_text(f"""
name = "on"
[model]
from = "{tmp_path / "first" / "model"}"
[data]
kind = "mixtures"
source = "{corpus / "voices"}"
noises = "{corpus / "dns"}"
seconds = 0.5
mixing = {{ enrolment_seconds = [0.5, 1.0], interferers = [0, 0] }}
[objective]
name = "enhancement"
[[stages]]
training = {{ steps = 1, batch_size = 2, learning_rate = 1e-9 }}
""")
    trained = recipe.run(recipe.read(path), tmp_path / "on")
    assert trained.settings == first.settings
    torch.testing.assert_close(trained.state_dict(), first.state_dict(), rtol=0, atol=1e-6)


def test_a_stage_may_name_the_objective_with_settings_of_its_own(corpus, tmp_path):
    steps = ["stages.0.training.steps=1", "stages.0.training.warmup=0"]
    signals = []
    for number, sdr in enumerate((1.0, 0.25)):
        named = f"stages.0.objective={{name='enhancement', sdr={sdr}}}"
        plan = planned(corpus, *steps, "objective.settings={sdr=5}", named)
        recipe.check(plan)
        assert recipe.run(plan, tmp_path / str(number)) is not None
        log = (tmp_path / str(number) / "stage-1" / "log.jsonl").read_text().splitlines()
        signals.append(json.loads(log[0])["signal"])
    assert signals[1] == pytest.approx(signals[0] / 4, rel=1e-4)


@pytest.mark.parametrize(
    "name", ["streaming-pse/voices", "streaming-pse/paper", "house/streaming-pse"]
)
def test_the_other_recipes_start(name, corpus, tmp_path):
    changes = [f"data.noises={corpus / 'dns'}", "data.mixing.interferers=[1, 1]"]
    split = "data.split=train"
    plan = planned(corpus, split, *changes, path=RECIPES / f"{name}.toml")
    assert recipe.run(plan, tmp_path) is not None


def test_the_house_enhancer_is_small():
    table = recipe.read(RECIPES / "house" / "streaming-pse.toml").model
    assert 2 * recipe.build(table).num_parameters() < 4 * 2**20


BAD = [
    ("objective.name=ctc", "kind 'transcripts' goes with the objective 'ctc', and only it does"),
    ("data.kind=images", "kind 'mixtures' goes with the objective 'enhancement', and only it"),
    ("stages.0.size=64", "stages of images have a size in pixels, e.g. size = 64; of sound none"),
    ("data.source=emoji", "emoji say nothing; give a source such as speech:sentences"),
    ("data.mixing.sir=[5, -5]", r"data.mixing: sir can't be from 5.* to -5.*; swap them"),
    ("data.mixing.sirr=[5, 9]", "data.mixing.sirr: Unexpected keyword argument"),
    ("data.seconds=0", "data.seconds: Input should be greater than 0"),
    ('model.methods=["edit"]', "methods are trained by the objectives"),
]


@pytest.mark.parametrize(("change", "told"), BAD)
def test_bad_recipes_are_refused_in_a_sentence(change, told):
    with pytest.raises(InputError, match=told):
        recipe.read(MINI, [change])


WRONG = [
    ("data.source=speech:songs", "'speech:songs' names no kind of the speech world; write speech"),
    ("data.source=nowhere", "there are no voices at 'nowhere'"),
    ("data.utterances={songs=3}", "data.utterances counts 'songs', which data.source='speech:sen"),
    ("model.class=pared.Streaming", "there is no model class 'pared.Streaming'"),
    ("model.class=pared.EDiT", "there is no model class 'pared.EDiT'"),
    ("model.config.width=90", "streaming-pse: width=90 doesn't split into 4 heads"),
    ("model.config.wdth=96", "streaming-pse has no setting 'wdth'; did you mean width"),
    ("model.config.conditioning=static_vector", "learns from another encoder's embeddings"),
    (
        'model={class="transformers.Wav2Vec2Model"}',
        "transformers.Wav2Vec2Model is no enhancer; give pared.StreamingPSE",
    ),
    ('model={from="nowhere"}', "nowhere can't be opened as an enhancer"),
    ("objective.settings.sdrr=1", "the objective enhancement can't be set so"),
]


@pytest.mark.parametrize(("change", "told"), WRONG)
def test_what_only_the_libraries_can_tell(change, told):
    with pytest.raises(InputError, match=told):
        recipe.check(recipe.read(MINI, [change]))


def test_noises_must_be_there(corpus, tmp_path):
    plan = planned(corpus, f"data.noises={tmp_path}")
    with pytest.raises(InputError, match="holds no recordings; give a folder of noises"):
        recipe.run(plan, tmp_path / "run")


def test_noises_are_read_without_the_speech_beside_them(corpus, tmp_path):
    for name in ("clean", "noise"):
        (tmp_path / name).mkdir()
    sound = soundfile.read(corpus / "dns" / "noise" / "0.wav")[0]
    soundfile.write(tmp_path / "noise" / "fan.wav", sound, 16000)
    (tmp_path / "clean" / "broken.wav").write_bytes(b"is never opened")
    for place in (tmp_path, tmp_path / "noise"):
        data = data_of(planned(corpus, f"data.noises={place}").data)
        assert [Path(key).name for key in data.noises.keys] == ["fan.wav"]


def clips(place, numbers):
    """Three talkers' tones by their numbers, laid out as Common Voice is."""
    tones, rows = Tones(speakers_count=3), ["client_id\tpath\tsentence"]
    (place / "voices" / "clips").mkdir(parents=True)
    for n in numbers:
        sound = tones.waveform(n).numpy()
        soundfile.write(place / "voices" / "clips" / f"{n}.wav", sound, 16000)
        rows.append(f"{tones.speakers[n]}\t{n}.wav\ttone")
    (place / "voices" / "train.tsv").write_text("\n".join(rows) + "\n")
    return tones


def test_speakers_of_one_clip_are_refused_or_left_out(tmp_path):
    tones = clips(tmp_path, [0, 1, 2, 3, 6, 7, 8])
    told = (
        r"1 of 7 items in '.*voices' can't be used: number 3 \(the only one of the speaker 'tone 1'"
    )
    with pytest.raises(InputError, match=rf"{told}.*or read with on_bad='skip'"):
        data_of(planned(tmp_path).data)
    table = planned(tmp_path, "data.on_bad=skip").data
    with pytest.warns(UserWarning, match=rf"{told}.*; they are skipped") as warned:
        data = data_of(table)
    assert len(warned) == 1 and len(data) == 6
    assert data.speech.speakers == ["tone 0"] * 3 + ["tone 2"] * 3
    assert data.speech.transcripts == ["tone"] * 6
    for number, n in enumerate([0, 1, 2, 6, 7, 8]):
        torch.testing.assert_close(
            data.speech.waveform(number), tones.waveform(n), rtol=0, atol=1e-4
        )
    batch = data.batch(torch.arange(6), generator_for(0))
    assert batch["speaker"].tolist() == [0, 0, 0, 1, 1, 1]


def test_speakers_of_whom_bad_recordings_leave_one_clip_are_left_out_too(tmp_path):
    clips(tmp_path, range(9))
    for n in (3, 5):
        (tmp_path / "voices" / "clips" / f"{n}.wav").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="they are skipped") as warned:
        data = data_of(planned(tmp_path, "data.on_bad=skip").data)
    read, left = (str(one.message) for one in warned)
    assert "2 of 9 items" in read and "1 of 7 items" in left and "'tone 1'" in left
    assert data.speech.speakers == ["tone 0"] * 3 + ["tone 2"] * 3
    # As many of the same corpus, but not the same ones.
    (tmp_path / "other").mkdir()
    clips(tmp_path / "other", [0, 1, 2, 6, 7, 8])
    whole = data_of(planned(tmp_path / "other").data)
    assert whole.speech.speakers == data.speech.speakers and whole.identity() != data.identity()


def test_of_speakers_of_one_clip_alone_nothing_can_be_mixed(tmp_path):
    clips(tmp_path, [0, 3, 6])
    told = "3 of 3 items .*; at least one item needs another of its speaker"
    with pytest.raises(InputError, match=told):
        data_of(planned(tmp_path, "data.on_bad=skip").data)


@pytest.mark.slow  # five minutes on one core
def test_the_mini_recipe_keeps_voices_that_it_has_never_heard(tmp_path):
    from dataclasses import replace

    plan = recipe.read(MINI)
    enhancer = recipe.run(plan, tmp_path)
    mixing = replace(plan.data.mixing, absent=0, alone=0, pitch=(1.0, 1.0))
    heldout = data_of(plan.data.model_copy(update={"mixing": mixing}), "heldout")
    batch = heldout.batch(torch.arange(48), generator_for(7))
    with torch.no_grad():
        kept = enhancer(batch["noisy"], batch["enrolment"], batch["enrolment_samples"])
    gain = si_sdr(kept, batch["target"]) - si_sdr(batch["noisy"], batch["target"])
    assert gain.mean() > 1.5
