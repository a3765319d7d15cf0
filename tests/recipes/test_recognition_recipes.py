"""Recipes of kind transcripts: on a corpus of tones, over waveforms and log-mel, and converted."""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import pared
from pared import recipe
from pared.errors import InputError
from pared.speech.recognition import load, transcribe
from pared.training import loop
from pared.worlds import speech
from tests.signals import ctrl_c
from tests.speech import recognisers
from tests.worlds.tones import Tones

soundfile = pytest.importorskip("soundfile")

RECIPES = Path(__file__).parents[2] / "recipes"
MINI = RECIPES / "recognition" / "mini.toml"
SHORT = [f"stages.0.training.{x}" for x in ("steps=3", "batch_size=4", "warmup=1", "log_every=1")]
SMALL = [
    f"model.config.{x}" for x in ("hidden_size=32", "intermediate_size=32", "num_hidden_layers=1")
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve tones laid out as LibriSpeech is."""
    place, tones = tmp_path_factory.mktemp("corpus"), Tones()
    chapter = place / "train" / "7" / "1"
    chapter.mkdir(parents=True)
    lines = [f"7-1-{n:04} {text.upper()}" for n, text in enumerate(tones.transcripts)]
    (chapter / "7-1.trans.txt").write_text("\n".join(lines) + "\n")
    for n in range(len(tones)):
        soundfile.write(chapter / f"7-1-{n:04}.flac", tones.waveform(n).numpy(), 16000)
    return place


def planned(corpus, *changes, short=SHORT):
    return recipe.read(MINI, [f"data.source={corpus}", *short, *SMALL, *changes])


@contextmanager
def interruption(at):
    """Ctrl-C in the middle of a step."""
    step = loop._Run.one_step

    def interrupted(self, number):
        if number == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    with ctrl_c(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "one_step", interrupted)
        yield


def test_what_is_trained_is_an_ordinary_folder(corpus, tmp_path):
    trained = recipe.run(planned(corpus), tmp_path)
    assert {p.name for p in (tmp_path / "model").iterdir()} >= {
        "config.json", "model.safetensors", "vocab.json", "tokenizer_config.json",
    }  # fmt: skip
    again, tone = load(tmp_path / "model"), Tones().waveform(0)
    assert torch.equal(again.scores(tone), trained.scores(tone))
    vocabulary = json.loads((tmp_path / "model" / "vocab.json").read_text())
    # The letters of this corpus, and of no other.
    assert set(vocabulary) == {"<pad>", "|", *"abcdefghijklnot"}
    assert again.model.config.vocab_size == len(vocabulary)
    log = [json.loads(x) for x in (tmp_path / "stage-1" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3] and "ctc" in log[-1]


def test_an_interrupted_training_goes_on_to_the_same_weights(corpus, tmp_path):
    """With dropout, SpecAugment and batch statistics, all of which must come back."""
    plan = planned(corpus, "model.config.hidden_dropout=0.1", "model.config.mask_time_prob=0.3")
    whole = recipe.run(plan, tmp_path / "whole")
    with interruption(at=1):
        assert recipe.run(plan, tmp_path / "parts") is None
    assert not (tmp_path / "parts" / "model").exists()
    parts = recipe.run(plan, tmp_path / "parts")
    one, other = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gradient_checkpointing_changes_no_weight(corpus, tmp_path):
    """Nor what batch norms have noted, whose layers run twice, nor dropout."""
    changes = ["model.config.hidden_dropout=0.1", "model.config.num_hidden_layers=2"]
    plain, spared = (
        recipe.run(
            planned(corpus, *changes, f"stages.0.training.gradient_checkpointing={asked}"),
            tmp_path / asked,
        ).model
        for asked in ("false", "true")
    )
    first, second = (model.wav2vec2_conformer.encoder.layers[0] for model in (plain, spared))
    assert second.gradient_checkpointing and not first.gradient_checkpointing
    one, other = plain.state_dict(), spared.state_dict()
    assert any(name.endswith("running_mean") for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_without_gradient_checkpointing_is_told_so():
    asked = ["stages.0.training.gradient_checkpointing=true"]
    plan = recipe.read(RECIPES / "streaming-pse" / "mini.toml", asked)
    with pytest.raises(InputError, match="StreamingPSE has no gradient checkpointing; leave grad"):
        recipe.check(plan)


@pytest.fixture
def noises(tmp_path):
    """Two folders with a recording each."""
    for name, index in (("low", 0), ("high", 11)):
        (tmp_path / name).mkdir()
        sound = Tones().waveform(index).numpy()
        soundfile.write(tmp_path / name / "hum.wav", sound, 16000)
    return tmp_path


def test_recorded_noises_are_part_of_the_data(corpus, noises):
    noisy = [*SHORT, "data.snr=[0, 5]"]
    recipe.run(planned(corpus, f"data.noises={noises / 'low'}", short=noisy), noises / "run")
    for other in ([], [f"data.noises={noises / 'high'}"]):
        with pytest.raises(InputError, match="data="):
            recipe.run(planned(corpus, *other, short=noisy), noises / "run")


@pytest.mark.parametrize(
    ("place", "told"),
    [("gone", "there is no folder .*gone'; give one"), ("", "holds no recordings; give a folder")],
)
def test_noises_are_looked_for_before_anything_is_read(place, told, corpus, tmp_path):
    changes = [f"data.noises={tmp_path / place}", "data.snr=[0, 5]", "data.split=nowhere"]
    with pytest.raises(InputError, match=told):
        recipe.run(planned(corpus, *changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_noises_that_nothing_would_hear_are_refused():
    with pytest.raises(InputError, match="noises among transcripts need an snr"):
        recipe.read(RECIPES / "recognition/mini.toml", ["data.noises=fans"])


def test_over_log_mel_features(corpus, tmp_path):
    changes = [
        "model.class=transformers.Wav2Vec2BertForCTC",
        'model.config={"hidden_size"=32, "intermediate_size"=32, "num_hidden_layers"=1,'
        ' "num_attention_heads"=2}',
        "data.extractor=transformers.SeamlessM4TFeatureExtractor",
    ]
    plan = recipe.read(MINI, [f"data.source={corpus}", *SHORT, *changes])
    trained = recipe.run(plan, tmp_path)
    tone = Tones().waveform(3)
    assert torch.equal(load(tmp_path / "model").scores(tone), trained.scores(tone))


@pytest.mark.parametrize("method", ["rope-asr", "summarymixing-asr"])
def test_with_another_mixer(method, tmp_path, corpus):
    plan = recipe.read(RECIPES / method / "mini.toml", [f"data.source={corpus}", *SHORT, *SMALL])
    trained = recipe.run(plan, tmp_path)
    assert [m.info.slug for m in pared.method.stack_of(trained.model)] == [method]
    again, tone = load(tmp_path / "model"), Tones().waveform(0)
    assert [m.info.slug for m in pared.method.stack_of(again.model)] == [method]
    torch.testing.assert_close(again.scores(tone), trained.scores(tone), rtol=0, atol=1e-5)


def test_going_on_from_a_recogniser(corpus, tmp_path):
    recipe.run(planned(corpus), tmp_path / "first")
    path = tmp_path / "on.toml"
    path.write_text(f"""
name = "on"
[model]
from = "{tmp_path / "first" / "model"}"
methods = ["rope-asr"]
[data]
kind = "transcripts"
source = "{corpus}"
snr = [0, 10]
[objective]
name = "ctc"
[[stages]]
training = {{ steps = 2, batch_size = 4 }}
""")
    trained = recipe.run(recipe.read(path), tmp_path / "on")
    vocabulary = [
        (tmp_path / name / "model" / "vocab.json").read_text() for name in ("first", "on")
    ]
    assert vocabulary[0] == vocabulary[1]
    assert [m.info.slug for m in pared.method.stack_of(trained.model)] == ["rope-asr"]


def test_going_on_in_half_precision(corpus, tmp_path):
    """It trains in float32, from the weights that they are, and is written in its own type."""
    # Tables of relative positions are rounded with a model, whatever it trains in.
    begun = recognisers.conformer(position_embeddings_type=None)
    for kind, dtype in (("half", torch.bfloat16), ("whole", torch.float32)):
        begun.model.to(torch.bfloat16).to(dtype)
        begun.save(tmp_path / kind)
        path = tmp_path / f"{kind}.toml"
        path.write_text(f"""
name = "{kind}"
[model]
from = "{tmp_path / kind}"
[data]
kind = "transcripts"
source = "{corpus}"
[objective]
name = "ctc"
[[stages]]
training = {{ steps = 2, batch_size = 4, learning_rate = 1e-3 }}
""")
    half, whole = (
        recipe.run(recipe.read(tmp_path / f"{kind}.toml"), tmp_path / f"{kind}-on").model
        for kind in ("half", "whole")
    )
    began = load(tmp_path / "half").model.state_dict()
    wanted = {name: weight.to(began[name].dtype) for name, weight in whole.state_dict().items()}
    assert any(not torch.equal(weight, began[name]) for name, weight in wanted.items())
    for model in (half, load(tmp_path / "half-on" / "model").model):
        found = model.state_dict()
        assert found["lm_head.weight"].dtype == torch.bfloat16
        assert [
            name for name, weight in found.items() if not torch.equal(weight, wanted[name])
        ] == []


def test_utterances_too_short_for_their_words(corpus, tmp_path):
    slow = "model.config.conv_stride=[40, 4, 20]"  # a frame in 200 ms
    with pytest.raises(InputError, match=r"12 of 12 items .*'TONE A' \(needs 6 frames and has 4\)"):
        recipe.run(planned(corpus, slow), tmp_path)


BAD = [
    ("data.source=emoji", "emoji say nothing; give a source such as speech:sentences"),
    ("data.kind=images", "kind 'transcripts' goes with the objective 'ctc'"),
    ("stages.0.size=64", "of sound none"),
    ("data.snr=5", r"data.snr: Input should be a valid tuple"),
]


@pytest.mark.parametrize(("change", "told"), BAD)
def test_bad_recipes_are_refused_in_a_sentence(change, told):
    with pytest.raises(InputError, match=told):
        recipe.read(MINI, [change])


WRONG = [
    ("data.source=speech:songs", r"'speech:songs' names no kind of the speech world; write speech"),
    ("data.source=nowhere", "there are no transcripts at 'nowhere'"),
    ("model.class=transformers.Wav2Vec2ConformerModel", "is not trained with CTC"),
    ("data.extractor=transformers.WhisperModel", "there is no feature extractor 'transformers.W"),
    ("data.extractor=os.system", "there is no feature extractor 'os.system'"),
    ("data.utterances={songs=3}", "data.utterances counts 'songs', which data.source='speech:dig"),
    (
        "data.extractor=transformers.SeamlessM4TFeatureExtractor",
        "reads input_values, which transformers.SeamlessM4TFeatureExtractor doesn't make",
    ),
]


@pytest.mark.parametrize(("change", "told"), WRONG)
def test_what_only_the_libraries_can_tell(change, told):
    with pytest.raises(InputError, match=told):
        recipe.check(recipe.read(MINI, [change]))


def test_all_parts_of_a_corpus(corpus):
    from pared.worlds.speech.sources import utterances

    assert (
        len(utterances(str(corpus), "all", {})) == len(utterances(str(corpus), "train", {})) == 12
    )
    with pytest.raises(InputError, match="no transcripts in a part 'test'"):
        utterances(str(corpus), "test", {})


def test_the_house_recogniser_is_small_enough_to_ship():
    from pared.speech.encoders import extractor_of
    from pared.speech.recognition.training import started
    from pared.worlds.speech.characters import Characters

    for name in ("conformer", "conformer-long"):
        plan = recipe.read(RECIPES / "house" / f"{name}.toml")
        extractor = extractor_of(plan.data.extractor)
        found = started(plan.model, recipe.build, extractor, Characters())
        count = sum(x.numel() for x in found.model.state_dict().values())
        assert 2 * count < 8 * 2**20  # bytes in half precision
        assert found.hop == 320


def test_what_attentions_are_compared_by_is_sentences_and_small():
    from pared.speech.encoders import extractor_of
    from pared.speech.recognition.training import started
    from pared.worlds.speech.characters import Characters

    plan = recipe.read(RECIPES / "recognition" / "sentences.toml")
    recipe.check(plan)
    assert "sentences" in plan.data.source and plan.data.snr == (5, 25)
    extractor = extractor_of(plan.data.extractor)
    found = started(plan.model, recipe.build, extractor, Characters())
    assert 1.0e6 < sum(p.numel() for p in found.model.parameters()) < 1.6e6
    loop.freeze_all_but(found.model, plan.stages[0].training.trainable)
    frozen = [name for name, p in found.model.named_parameters() if not p.requires_grad]
    assert frozen and all(".conv_layers.0." in name for name in frozen)


def test_the_sound_itself_gets_no_gradients_and_weights_the_same():
    from pared.speech.encoders import spare_the_sound

    sound = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    front = recognisers.conformer().model.wav2vec2_conformer.feature_extractor.train()
    front(sound).square().sum().backward()
    plain = {name: parameter.grad for name, parameter in front.named_parameters()}
    front.zero_grad()
    spare_the_sound(front)
    front.requires_grad_(False)
    assert not front(sound).requires_grad  # transformers': it would, for the sound
    front.requires_grad_(True)
    front(sound).square().sum().backward()
    for name, parameter in front.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=0, atol=0)


def test_several_kinds_of_the_speech_world_are_one(monkeypatch):
    from pared.worlds.speech.sources import utterances

    def load(kind, split, count, synthesizers=("espeak-ng",)):
        torch.manual_seed(len(kind))
        lengths = [100 * n + len(kind) for n in range(1, count + 1)]
        said = [f"{kind} {split}"] * count
        samples = torch.randint(-99, 99, (sum(lengths),), dtype=torch.int16)
        return speech.Speech(samples, lengths, said, ["someone"] * count, kind)

    monkeypatch.setattr(speech, "load", load)
    both = utterances("speech:digits+commands", "train", {"commands": 3, "digits": 3})
    one, other = load("digits", "train", 3), load("commands", "train", 3)
    assert both.transcripts == one.transcripts + other.transcripts and len(both) == 6
    assert torch.equal(both.waveform(2), one.waveform(2))
    assert torch.equal(both.waveform(4), other.waveform(1))
    assert both.identity() not in (one.identity(), other.identity())
    assert utterances("speech:digits", "train", {"digits": 3}).identity() == "digits"


@pytest.mark.slow  # four minutes on one core
def test_the_mini_recipe_learns_digits_of_voices_it_has_never_heard(tmp_path):
    from pared.bench.words import word_errors

    recogniser = recipe.run(recipe.read(MINI), tmp_path)
    heldout = speech.load("digits", "heldout")
    found = [
        " ".join(word.text for word in transcribe(recogniser, [heldout.waveform(n)]))
        for n in range(len(heldout))
    ]
    assert word_errors(heldout.transcripts, found).rate < 0.15
