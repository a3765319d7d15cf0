"""The contrastive loss against that of CLIP itself, and that it brings captions to pictures."""

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from pared import recipe
from pared.objectives.contrastive import Contrastive
from pared.worlds.datasets import ImageTextData, fitted, tokenize
from pared.worlds.house.tokenizer import train_tokenizer
from pared.worlds.readers import read

COLOURS = ["red", "green", "blue", "black"]
SIZE, WIDTH = 16, 16
TOWER = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = TOWER | {
    "vocab_size": 600, "hidden_size": WIDTH, "max_position_embeddings": 24,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": WIDTH,
}  # fmt: skip
VISION = TOWER | {
    "image_size": SIZE, "patch_size": 8, "hidden_size": WIDTH, "projection_dim": WIDTH,
}  # fmt: skip


def toy():
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=WIDTH))


def generator():
    return torch.Generator().manual_seed(0)


def batch():
    images = torch.randint(256, (4, 3, SIZE, SIZE), generator=generator(), dtype=torch.uint8)
    captions = [f"a {colour} square" for colour in COLOURS]
    data = ImageTextData(images, *tokenize(train_tokenizer(captions, merges=20), captions))
    return data.batch(torch.arange(4), generator())


@torch.no_grad()
def test_it_is_the_loss_that_clip_itself_would_give():
    """Image i against all texts, and text i against all images: the two sides differ."""
    model, given = toy(), batch()
    terms, own = Contrastive()(model, given, generator()), model(**given, return_loss=True)
    similarities = own.logits_per_image
    image, text = (-similarities.log_softmax(dim).diagonal().mean() / 2 for dim in (1, 0))
    assert terms.keys() == {"image", "text"} and abs(image - text) > 1e-3
    torch.testing.assert_close(terms["image"], image)
    torch.testing.assert_close(terms["text"], text)
    torch.testing.assert_close(terms["image"] + terms["text"], own.loss)


@pytest.fixture
def squares(tmp_path):
    """A folder of a square of each colour with its caption."""
    (tmp_path / "squares").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (SIZE, SIZE), colour).save(tmp_path / "squares" / f"{colour}.png")
        (tmp_path / "squares" / f"{colour}.txt").write_text(f"a {colour} square")
    return tmp_path / "squares"


@torch.no_grad()
def test_a_recipe_teaches_which_caption_is_whose(squares, tmp_path):
    """And its tokenizer, trained on the same captions, is saved beside the model."""
    (tmp_path / "clip.toml").write_text(f"""
name = "toy-clip"
[model]
class = "transformers.CLIPModel"
config = {{ projection_dim = {WIDTH} }}
[data]
kind = "image-text"
source = "{squares}"
[objective]
name = "contrastive"
[[stages]]
size = {SIZE}
training = {{ steps = 60, batch_size = 4, learning_rate = 1e-2, warmup = 5 }}
""")
    towers = [
        f"model.config.{tower}.{name}={value}"
        for tower, config in (("text_config", TEXT), ("vision_config", VISION))
        for name, value in config.items()
    ]
    with torch.enable_grad():
        assert recipe.run(recipe.read(tmp_path / "clip.toml", towers), tmp_path / "out")
    model = CLIPModel.from_pretrained(tmp_path / "out" / "model").eval()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "out" / "model")
    items = read(squares)
    ids, mask = tokenize(tokenizer, [item.caption for item in items])
    pixels = fitted(items, SIZE).float() / 127.5 - 1
    found = model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits_per_image
    assert found.argmax(dim=0).tolist() == found.argmax(dim=1).tolist() == [0, 1, 2, 3]
