"""Recipes of kind transcripts that start from a pretrained encoder: what is kept, what is new."""

import json
import shutil

import pytest
import torch
import transformers

import pared
from pared import recipe
from pared.anatomy import presets
from pared.errors import InputError
from pared.speech.recognition import load
from pared.speech.recognition.pretrained import is_pretrained, recogniser_on
from pared.worlds.speech.characters import Characters
from tests.recipes.test_pretraining_recipes import SHORT, planned
from tests.recipes.test_recognition_recipes import RECIPES, corpus
from tests.worlds.tones import Tones

__all__ = ["corpus"]

TUNE = RECIPES / "summarymixing-ssl" / "finetune-mini.toml"
PREFIX = "wav2vec2_conformer"


@pytest.fixture(scope="module")
def encoders(corpus, tmp_path_factory):
    """Folders of an encoder with SummaryMixing, pretrained for three steps, and of a stock one."""
    place, stock = tmp_path_factory.mktemp("encoders"), ["model.methods=[]"]
    recipe.run(planned(corpus), place / "converted")
    recipe.run(planned(corpus, "model.config.conv_dim=[160, 16, 16]", *stock), place / "stock")
    return {name: place / name / "model" for name in ("converted", "stock")}


def tuned(corpus, folder, *changes):
    return recipe.read(TUNE, [f"data.source={corpus}", f"model.from={folder}", *SHORT, *changes])


def of_encoder(model):
    """Weights of the encoder, by their names in it."""
    weights = getattr(model, model.base_model_prefix).state_dict()
    return {name: value.clone() for name, value in weights.items()}


@pytest.mark.parametrize("kind", ["converted", "stock"])
def test_the_encoder_is_the_pretrained_one(encoders, kind):
    known = pared.load(encoders[kind])
    found = recogniser_on(encoders[kind], {"final_dropout": 0.3}, Characters(" ab"), seed=3)
    before, after = of_encoder(known), of_encoder(found.model)
    assert before.keys() == after.keys() and len(before) > 30
    assert all(torch.equal(before[name], after[name]) for name in before)
    specs = [[m.spec() for m in pared.method.stack_of(model)] for model in (known, found.model)]
    assert specs[0] == specs[1] and len(specs[0]) == (2 if kind == "converted" else 0)
    tone = Tones().waveform(0)[None]
    with torch.no_grad():
        frames = [getattr(m.eval(), PREFIX)(tone).last_hidden_state for m in (known, found.model)]
    assert torch.equal(*frames)


def test_what_is_new(encoders):
    """The head, by its seed; masks as a recogniser has them, not as pre-training had."""
    first, same, other = (
        recogniser_on(encoders["converted"], {}, Characters(" ab"), seed).model
        for seed in (3, 3, 4)
    )
    assert first.lm_head.out_features == 4 == first.config.vocab_size
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert pared.load(encoders["converted"]).config.mask_time_prob == 0.65
    assert first.config.mask_time_prob == transformers.Wav2Vec2ConformerConfig().mask_time_prob


def test_without_masks_their_vector_is_left_out(encoders):
    changes = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    model = recogniser_on(encoders["converted"], changes, Characters(" ab"), 0).model
    known = of_encoder(pared.load(encoders["converted"]))
    assert known.keys() - of_encoder(model).keys() == {"masked_spec_embed"}


@pytest.mark.parametrize("kind", ["converted", "stock"])
def test_it_is_tuned_and_saved_as_a_recogniser(encoders, kind, corpus, tmp_path):
    """The encoder trains; the convolutions that make its latents don't, as the recipe has it."""
    trained = recipe.run(tuned(corpus, encoders[kind], "model.methods=[]"), tmp_path)
    before, after = of_encoder(pared.load(encoders[kind])), of_encoder(trained.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("feature_extractor.") for name in changed)
    blocks = [name for name in changed if name.startswith("encoder.layers.")]
    assert len(blocks) > 10 and "feature_projection.projection.weight" in changed
    again, tone = load(tmp_path / "model"), Tones().waveform(0)
    torch.testing.assert_close(again.scores(tone), trained.scores(tone), rtol=0, atol=1e-5)
    slugs = [m.info.slug for m in pared.method.stack_of(again.model)]
    assert slugs == (["mel-front", "summarymixing-asr"] if kind == "converted" else [])
    vocabulary = json.loads((tmp_path / "model" / "vocab.json").read_text())
    assert set(vocabulary) == {"<pad>", "|", *"abcdefghijklnot"}


def test_all_of_it_trains_where_the_recipe_says_so(encoders, corpus, tmp_path):
    plan = tuned(corpus, encoders["stock"], 'stages.0.training.trainable=["*"]')
    after = of_encoder(recipe.run(plan, tmp_path).model)
    before = of_encoder(pared.load(encoders["stock"]))
    name = "feature_extractor.conv_layers.0.conv.weight"
    assert not torch.equal(before[name], after[name])


def test_more_methods_are_put_on_it(encoders, corpus, tmp_path):
    plan = tuned(corpus, encoders["stock"], 'model.methods=["rope-asr"]')
    model = recipe.run(plan, tmp_path).model
    assert [m.info.slug for m in pared.method.stack_of(model)] == ["rope-asr"]


def test_what_it_may_start_from(encoders, corpus, tmp_path):
    assert all(map(is_pretrained, encoders.values()))
    recogniser = tmp_path / "recogniser"
    recogniser_on(encoders["stock"], {}, Characters(" ab"), 0).save(recogniser)
    assert not is_pretrained(recogniser) and not is_pretrained(tmp_path)
    picture = tmp_path / "picture"
    presets.build("toy:dit", device="cpu").save_pretrained(picture)
    (tmp_path / "cut").mkdir()
    shutil.copy(encoders["stock"] / "config.json", tmp_path / "cut")
    refused = [
        (
            tmp_path / "nowhere",
            "there is no folder .*; give a saved CTC model or a pretrained speech",
        ),
        (picture, "holds a DiTTransformer2DModel, which is no CTC model"),
        (recogniser, "holds a CTC model, which keeps its configuration; leave model.config out"),
    ]
    for folder, told in refused:
        with pytest.raises(InputError, match=told):
            recipe.check(tuned(corpus, folder))
    with pytest.raises(InputError, match="cut can't be opened as a model"):
        recipe.run(tuned(corpus, tmp_path / "cut"), tmp_path / "run")


def test_changes_that_do_not_fit(encoders, corpus, tmp_path):
    slip = tuned(corpus, encoders["converted"], "model.config.hiden_dropout=0.1")
    with pytest.raises(InputError, match="a Wav2Vec2ConformerForCTC has no entry 'hiden_dropout'"):
        recipe.check(slip)
    for change in ("hidden_size=64", "num_hidden_layers=2"):
        plan = tuned(corpus, encoders["converted"], f"model.config.{change}")
        with pytest.raises(InputError, match=r"model\.config doesn't fit the weights in"):
            recipe.run(plan, tmp_path)
