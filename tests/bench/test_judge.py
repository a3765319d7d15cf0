"""The judge: pictures and texts as its model was trained to get them."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from pared.bench.judge import BATCH, Judge, judge_of
from pared.errors import InputError
from pared.worlds.house.tokenizer import train_tokenizer

SIDE, TEXTS = 16, ["red apple", "green apple", "sailboat"]
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TOWER |= {"num_attention_heads": 2}
MEAN, STD = [0.48, 0.45, 0.40], [0.27, 0.26, 0.20]


def parts():
    """A CLIP model of random weights, and a tokenizer for it."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, merges=20)
    tokenizer.model_max_length = 20
    text = TOWER | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    text |= {"max_position_embeddings": 20}
    vision = TOWER | {"image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return CLIPModel(config), tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same, saved."""
    place = tmp_path_factory.mktemp("judge")
    for part in parts():
        part.save_pretrained(place)
    return place


def pictures(count, side=SIDE):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def seen(model, pixels):
    """The unit features of pixels as the model gets them."""
    found = model.get_image_features(pixel_values=pixels)
    return F.normalize(found if torch.is_tensor(found) else found.pooler_output, dim=-1)


def test_pixels_are_centred_and_scaled_as_the_folder_says(folder, tmp_path):
    (model, _), images = parts(), pictures(2)
    plain = judge_of(folder)
    assert (plain.mean, plain.std) == ((0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close(plain.of_images(images), seen(model.eval(), 2 * images - 1))
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    statistics = {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    found = judge_of(str(tmp_path)).of_images(images)
    torch.testing.assert_close(found, seen(model, (images - mean) / std))
    assert (found - plain.of_images(images)).abs().max() > 0.01


def test_pictures_of_any_size_are_brought_to_the_models_own():
    judge = judge_of(parts())
    assert judge.dimensions == 8
    shades = torch.tensor([0.0, 0.4, 1.0]).view(3, 1, 1, 1)
    small, large = (judge.of_images(shades.expand(3, 3, n, n)) for n in (SIDE, 50))
    torch.testing.assert_close(large, small)
    # Bicubic filters overshoot at edges; no pixel is beyond black or white.
    stripes = torch.zeros(1, 3, 50, 50)
    stripes[..., ::7] = 1
    brought = F.interpolate(stripes, (SIDE, SIDE), mode="bicubic", antialias=True)
    assert brought.min() < 0
    torch.testing.assert_close(
        judge.of_images(stripes), seen(judge.model, 2 * brought.clamp(0, 1) - 1)
    )


def test_as_many_as_there_are_in_their_order():
    judge, images = judge_of(parts()), pictures(BATCH + 3)
    together = judge.of_images(images)
    assert together.shape == (BATCH + 3, 8)
    torch.testing.assert_close(together[-3:], judge.of_images(images[-3:]))
    texts = [TEXTS[n % 3] for n in range(BATCH + 3)]
    told = judge.of_texts(texts)
    torch.testing.assert_close(told.norm(dim=1), torch.ones(BATCH + 3))
    torch.testing.assert_close(told, judge.of_texts(TEXTS).repeat(BATCH, 1)[: BATCH + 3])
    # What is too long for the model is cut.
    assert judge.of_texts(["red apple " * 50]).isfinite().all()


def test_what_is_no_judge(tmp_path):
    judge = judge_of(parts())
    assert judge_of(judge) is judge and isinstance(judge, Judge)
    with pytest.raises(InputError, match="the judge is a int; give a folder with a CLIP model"):
        judge_of(3)
    with pytest.raises(InputError, match="can't be opened as a CLIP model"):
        judge_of(tmp_path)
