"""Recipes of kind recordings: what is saved, going on, and what is refused."""

import json

import pytest
import torch

import pared
from pared import recipe
from pared.errors import InputError
from pared.objectives.wav2vec2 import Wav2Vec2Pretraining
from pared.speech.encoders import extractor_of
from pared.speech.pretraining import PretrainingData
from pared.worlds.speech.sources import kinds_of
from tests.recipes.test_recognition_recipes import RECIPES, corpus, interruption
from tests.worlds.tones import Tones

__all__ = ["corpus"]

MINI = RECIPES / "summarymixing-ssl" / "mini.toml"
SHORT = [f"stages.0.training.{x}" for x in ("steps=3", "batch_size=4", "warmup=1", "log_every=1")]
SMALL = [
    f"model.config.{x}"
    for x in (
        "hidden_size=32", "intermediate_size=32", "num_hidden_layers=1", "conv_dim=[20, 16, 16]",
        "num_conv_pos_embedding_groups=32", "num_codevectors_per_group=16",
    )
]  # fmt: skip


def planned(corpus, *changes):
    return recipe.read(
        MINI, [f"data.source={corpus}", "data.seconds=0.7", *SHORT, *SMALL, *changes]
    )


def test_what_is_trained_is_an_ordinary_folder(corpus, tmp_path):
    trained = recipe.run(planned(corpus), tmp_path)
    assert {p.name for p in (tmp_path / "model").iterdir()} >= {
        "config.json", "model.safetensors", "pared.json", "preprocessor_config.json",
    }  # fmt: skip
    again = pared.load(tmp_path / "model")
    slugs = ["mel-front", "summarymixing-asr"]
    assert [m.info.slug for m in pared.method.stack_of(again)] == slugs
    tone = Tones().waveform(0)[None]
    with torch.no_grad():
        assert torch.equal(again(tone).projected_states, trained(tone).projected_states)
    log = [json.loads(x) for x in (tmp_path / "stage-1" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    assert {"contrastive", "diversity"} <= log[-1].keys()


def test_an_interrupted_training_goes_on_to_the_same_weights(corpus, tmp_path):
    """With a temperature that falls from step to step."""
    plan = planned(corpus, "stages.0.objective={cooling=0.5, coolest=0.1}")
    whole = recipe.run(plan, tmp_path / "whole")
    with interruption(at=1):
        assert recipe.run(plan, tmp_path / "parts") is None
    parts = recipe.run(plan, tmp_path / "parts")
    assert whole.quantizer.temperature == parts.quantizer.temperature == 0.5
    one, other = whole.state_dict(), parts.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stage_may_name_the_objective_with_settings_of_its_own(corpus, tmp_path):
    """The recipe's own span would be longer than any utterance."""
    steps = ["stages.0.training.steps=1", "stages.0.training.warmup=0"]
    named = "stages.0.objective={name='wav2vec2', span=5}"
    plan = planned(corpus, *steps, "objective.settings={span=60}", named)
    recipe.check(plan)
    assert recipe.run(plan, tmp_path) is not None


def test_stock_attention_over_samples(corpus, tmp_path):
    changes = ["model.methods=[]", "model.config.conv_dim=[160, 16, 16]"]
    trained = recipe.run(planned(corpus, *changes), tmp_path)
    assert not (tmp_path / "model" / "pared.json").exists()
    assert not pared.method.stack_of(trained)


def test_batches_are_cut_and_of_similar_length():
    class Heard(Tones):
        @property
        def lengths(self):
            return [len(self.waveform(n)) for n in range(12)]

    data = PretrainingData(Heard(), extractor_of("transformers.Wav2Vec2FeatureExtractor"), 0.85)
    assert max(data.lengths) == 13_600 and min(data.lengths) == 12_800
    batch = data.batch(torch.tensor([0, 11]), torch.Generator().manual_seed(0))
    assert batch["input_lengths"].tolist() == [12_800, 13_600]
    assert batch["attention_mask"].sum(dim=1).tolist() == [12_800, 13_600]
    assert not batch["input_values"][0, 12_800:].any()
    again = data.batch(torch.tensor([0, 11]), torch.Generator().manual_seed(1))
    assert torch.equal(batch["input_values"][0], again["input_values"][0])
    assert not torch.equal(batch["input_values"][1], again["input_values"][1])


def test_utterances_shorter_than_a_mask(corpus, tmp_path):
    told = r"12 of 12 items .* number 0 \(has 38 frames, and masks hide 60\)"
    with pytest.raises(InputError, match=told):
        recipe.run(planned(corpus, "objective.settings={span=60}", "data.seconds=4"), tmp_path)
    some = "objective.settings={span=40}"
    skipping = planned(corpus, some, "data.seconds=4", "data.on_bad=skip")
    with pytest.warns(UserWarning, match="they are skipped"):
        assert recipe.run(skipping, tmp_path) is not None


def test_the_paper_recipe_is_whole():
    plan = recipe.read(RECIPES / "summarymixing-ssl" / "paper.toml", ["data.source=speech:digits"])
    recipe.check(plan)
    assert plan.model.methods == ("mel-front", "summarymixing-asr")
    Wav2Vec2Pretraining(**plan.objective.settings)


def test_the_recipe_of_the_probes_is_that_of_the_mini_on_commands_too():
    plan, mini = (
        recipe.read(RECIPES / "summarymixing-ssl" / f"{name}.toml") for name in ("probed", "mini")
    )
    recipe.check(plan)
    assert (plan.model, plan.objective) == (mini.model, mini.objective)
    assert kinds_of(plan.data.source) == ["digits", "commands"]


def test_other_voices_can_be_learnt_from_too():
    plan = recipe.read(MINI, ["data.source=speech:digits:espeak-ng+flite"])
    recipe.check(plan)
    wrong = recipe.read(MINI, ["data.source=speech:digits:festival"])
    with pytest.raises(InputError, match="no synthesizer 'festival'; known are espeak-ng, flite"):
        recipe.check(wrong)


WRONG = [
    ("model.class=transformers.Wav2Vec2ConformerForCTC", "can't be pre-trained; give a class"),
    ("data.extractor=transformers.SeamlessM4TFeatureExtractor", "reads input_values, which"),
    ("data.utterances={songs=3}", "data.utterances counts 'songs'"),
    ("objective.settings={spans=3}", "the objective wav2vec2 can't be set so"),
    ("data.source=nowhere", "there are no recordings at 'nowhere'"),
]


@pytest.mark.parametrize(("change", "told"), WRONG)
def test_what_only_the_libraries_can_tell(change, told):
    with pytest.raises(InputError, match=told):
        recipe.check(recipe.read(MINI, [change]))


def test_methods_alone_are_trained_in_a_pipeline_alone():
    told = r"train = 'methods' is for pipelines to start from; leave it out, and name what trains"
    for path in (MINI, RECIPES / "recognition" / "mini.toml", RECIPES / "house" / "unet.toml"):
        with pytest.raises(InputError, match=told):
            recipe.read(path, ["stages.0.train=methods"])


def test_recordings_go_with_their_objective():
    with pytest.raises(InputError, match="'transcripts' goes with the objective 'ctc'"):
        recipe.read(MINI, ["data.kind=transcripts"])
