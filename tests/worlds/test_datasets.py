"""Data as the training loop draws it."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tests.recipes.pipelines import pipeline, vae

from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.training.data import beside, generator_for
from pared.worlds.datasets import (
    Balanced,
    ImageData,
    ImageTextData,
    LatentData,
    PipelineData,
    augment,
    balanced_weights,
    encode_latents,
    fitted,
    latents_of,
)
from pared.worlds.readers import read


class Numbers:
    """Samples that are their own index."""

    def __len__(self):
        return 4

    def batch(self, indices, generator):
        return {"index": indices}

    def identity(self):
        return "numbers"


def test_balanced_draws_every_group_alike():
    weights = balanced_weights(["man", "man", "man", "cake"], balance=1)
    data = Balanced(Numbers(), weights)
    drawn = data.batch(torch.arange(6000), generator_for(1, 2))["index"]
    assert (drawn == 3).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (drawn == 0).float().mean() == pytest.approx(1 / 6, abs=0.03)


def test_balance_of_half_lies_between():
    weights = balanced_weights(["a"] * 4 + ["b"], balance=0.5)
    assert weights.tolist() == [0.5] * 4 + [1.0]


def test_balanced_draws_by_the_generator_alone_and_shows_in_the_identity():
    weights = balanced_weights(["a", "a", "b", "b"], balance=1)
    data = Balanced(Numbers(), weights)
    first, second = (data.batch(torch.arange(50), generator_for(3)) for _ in range(2))
    assert torch.equal(first["index"], second["index"])
    other = Balanced(Numbers(), balanced_weights(["a", "b", "b", "b"], balance=1))
    assert data.identity() != other.identity() != "numbers"


def test_data_small_beside_an_accelerators_memory_move_to_it(monkeypatch):
    latents = torch.rand(3, 1, 2, 2)
    held = LatentData(latents, latents, {"text": torch.rand(3, 2)}, {"text": torch.zeros(2)})
    data = Balanced(held, torch.ones(3))
    cuda, taken = torch.device("cuda"), []
    monkeypatch.setattr(LatentData, "to", lambda self, device: taken.append(device) or self)
    assert held.nbytes == data.nbytes == 4 * (12 + 12 + 6)
    for free, moved in ((10 * data.nbytes, 0), (10 * data.nbytes + 10, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        beside(data, cuda)
        assert len(taken) == moved
    assert beside(data, torch.device("cpu")) is data
    assert beside(Numbers(), cuda).batch([1], None) == {"index": [1]}


# Pictures, and pictures with captions ------------------------------------------------------------


def test_half_of_the_pictures_are_mirrored():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 4, 64).expand(1, 3, 4, 64)
    data, plain = ImageData(images), ImageData(images, flip=False)
    drawn = torch.zeros(200, dtype=torch.int64)
    as_it_is = plain.batch(drawn[:1], generator_for(1))["pixel_values"]
    assert torch.equal(as_it_is, images / 127.5 - 1)
    pixels = data.batch(drawn, generator_for(1))["pixel_values"]
    mirrored = (pixels == as_it_is.flip(-1)).flatten(1).all(dim=1)
    kept = (pixels == as_it_is).flatten(1).all(dim=1)
    assert (mirrored ^ kept).all() and 70 < mirrored.sum() < 130
    again = data.batch(drawn, generator_for(1))["pixel_values"]
    assert torch.equal(again, pixels) and data.identity() != ImageData(images.flip(-1)).identity()


def test_captions_stay_with_their_pictures():
    shades = torch.tensor([0, 128, 255], dtype=torch.uint8)
    images = shades.view(3, 1, 1, 1).expand(3, 3, 16, 16)
    ids, mask = torch.tensor([[0, 5, 1], [0, 6, 1], [0, 1, 1]]), torch.tensor([[1, 1, 1]] * 3)
    mask[2, 2] = 0
    data = ImageTextData(images, ids, mask)
    chosen = torch.tensor([2, 0, 1])
    batch, again = (data.batch(chosen, generator_for(1)) for _ in range(2))
    assert len(data) == 3 and all(torch.equal(again[name], batch[name]) for name in batch)
    assert torch.equal(batch["input_ids"], ids[chosen])
    assert torch.equal(batch["attention_mask"], mask[chosen])
    middle = batch["pixel_values"][..., 6:10, 6:10].mean(dim=(1, 2, 3))
    # Brightness is off by 0.15 at most, and noise of 0.08 on 48 numbers by little more.
    torch.testing.assert_close(middle, torch.tensor([1.0, -1.0, 0.0]), rtol=0, atol=0.2)
    others = [ImageTextData(images.flip(0), ids, mask), ImageTextData(images, ids.flip(0), mask)]
    assert len({each.identity() for each in (data, *others)}) == 3


def test_augmented_pictures_have_white_around_them_and_their_own_brightness_and_noise():
    pixels = augment(torch.ones(300, 3, 16, 16), generator_for(1))
    brightness, noise = pixels.mean(dim=(1, 2, 3)), pixels.std(dim=(1, 2, 3))
    # 0.9 to 1.1 times white, and 0.05 more or less: black around it would be far below.
    assert 0.83 < brightness.min() < 0.9 and 1.1 < brightness.max() < 1.17
    assert noise.min() < 0.005 and 0.07 < noise.max() < 0.09
    edge = pixels[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(dim=(1, 2))
    torch.testing.assert_close(edge, brightness, rtol=0, atol=0.15)


def test_augmented_pictures_are_zoomed_and_shifted():
    """By the middle and the size of a black square."""
    pixels = torch.ones(300, 3, 64, 64)
    pixels[..., 20:44, 20:44] = -1
    black = (augment(pixels, generator_for(1)).mean(dim=1) < 0).double()
    area, places = black.sum(dim=(1, 2)), torch.arange(64.0).double() - 31.5
    side = area.sqrt() / 24
    assert 1 / 1.2 < side.min() < 0.9 and 1.12 < side.max() < 1 / 0.82
    # A shift by 0.12 of half a picture, in units of what is seen, which zoom makes larger.
    for dim in (1, 2):
        middle = (black.sum(dim=dim) * places).sum(dim=1) / area
        assert -5 < middle.min() < -3 and 3 < middle.max() < 5


def test_augmented_pictures_are_blurred_and_a_good_third_stays_sharp():
    """By the steepest step across an edge, from -1 to 1."""
    pixels = torch.ones(300, 3, 64, 64)
    pixels[..., :32] = -1
    seen = augment(pixels, generator_for(1)).mean(dim=(1, 2))  # over rows, against the noise
    steps = seen.diff(dim=-1).abs().amax(dim=-1)
    # Sampling between two pixels leaves half of the step at least; blur two thirds of that.
    assert 0.2 < (steps > 1.4).float().mean() < 0.6
    assert 0.15 < (steps < 0.85).float().mean() < 0.6


# Data from pipelines -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("pixart", {"text": 64, "mask": None}),
        ("unet", {"text": 32}),
        ("sd3", {"text": 64, "pooled": 64}),
        ("flux", {"text": 64, "pooled": 32}),
    ],
)
def test_the_pipeline_of_a_family_encodes_its_own_data(kind, entries):
    toy = pipeline(kind)
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    data = latents_of(toy, images, ["red heart", "cat face", "rocket"], drop=0.5)
    batch = data.batch(torch.arange(3), generator_for(0))
    assert batch["latents"].shape[0::2] == (3, 8)
    assert {n for n in batch if not n.startswith("latent")} == set(entries)
    for name, width in entries.items():
        assert len(batch[name]) == 3
        assert width is None or batch[name].shape[-1] == width


@pytest.fixture
def photos(tmp_path):
    """Three pictures that aren't square, and their captions."""
    for number, caption in enumerate(("cat face", "rocket", "red heart")):
        Image.effect_noise((60, 40 + number), 60).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    return read(tmp_path)


@pytest.mark.parametrize("kind", ["unet", "sd3"])
def test_encoded_as_they_are_drawn_they_are_what_is_held(photos, kind):
    """Each with its own caption; and a dropped prompt is the empty one, in all its entries."""
    toy, chosen = pipeline(kind), torch.tensor([2, 0])
    captions = [item.caption for item in photos]
    held = latents_of(toy, fitted(photos, 32), captions, drop=0.0)
    wanted = held.batch(chosen, generator_for(0))
    drawn = PipelineData(toy, photos, 32, drop=0.0)
    batch = drawn.batch(chosen, generator_for(0))
    assert len(drawn) == 3 and batch.keys() == wanted.keys()
    for name, entry in wanted.items():
        # Of three in a batch, or of two: a product adds up in another order.
        torch.testing.assert_close(batch[name], entry, rtol=1e-4, atol=1e-5)
    drawn = PipelineData(toy, photos, 32, drop=1.0)
    batch, empty = drawn.batch(chosen, generator_for(0)), drawn.empty
    assert empty.keys() == wanted.keys() - {"latents", "latent_std"}
    for name, entry in empty.items():
        torch.testing.assert_close(entry, held.empty[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch[name], torch.stack([entry] * 2), rtol=1e-4, atol=1e-5)
    assert drawn.identity() != PipelineData(toy, photos, 16).identity()


def test_an_autoencoder_gets_large_pictures_one_by_one():
    seen, net = [], vae(4).eval()
    net.encoder.register_forward_pre_hook(lambda net, args: seen.append(tuple(args[0].shape)))
    for count, side in ((130, 64), (2, 1024)):
        encode_latents(net, torch.zeros(count, 3, side, side, dtype=torch.uint8))
    assert seen == [(128, 3, 64, 64), (2, 3, 64, 64), *[(1, 3, 1024, 1024)] * 2]


@torch.no_grad()
def test_an_autoencoder_that_overflows_in_float16_encodes_in_float32():
    """What it computes is beyond 65504 on the way, as SDXL's is."""
    net = vae(4).eval()
    net.encoder.conv_in.weight.mul_(2e5)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    net.half()
    mean, std = encode_latents(net, images)
    assert mean.isfinite().all() and std.isfinite().all()
    assert net.dtype == torch.float16, "it stays what it was"
    net.register_to_config(force_upcast=False)
    assert encode_latents(net, images)[0].isnan().any()


def test_prompts_are_dropped_with_every_entry_of_their_condition():
    condition = {"text": torch.ones(4, 2, 3), "pooled": torch.ones(4, 5)}
    empty = {name: torch.zeros_like(entry[0]) for name, entry in condition.items()}
    latents = torch.zeros(4, 1, 2, 2)
    data = LatentData(latents, latents, condition, empty, drop=0.5)
    batch = data.batch(torch.arange(4).repeat(20), generator_for(1))
    dropped = batch["text"].sum(dim=(1, 2)) == 0
    assert 20 < dropped.sum() < 60
    assert torch.equal(dropped, batch["pooled"].sum(dim=1) == 0)
    assert condition["text"].all(), "the data itself must stay as it is"


def test_images_of_labels_have_no_prompts_to_encode():
    family = anatomy.of(presets.build("toy:dit", device="cpu"))
    with pytest.raises(InputError, match="no prompts that could be encoded"):
        family.encode(None, ["a"])


def test_latents_are_named_by_what_they_are_made_of():
    """Rounding, which the number of threads changes, must not keep a run from going on."""
    pipe = pipeline("unet")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    data = latents_of(pipe, images, ["a", "b"])
    rounded = replace(data, latents=data.latents + 1e-7)
    assert rounded.identity() == data.identity() == latents_of(pipe, images, ["a", "b"]).identity()
    others = [latents_of(pipe, images, ["a", "c"]), latents_of(pipe, images.flip(0), ["a", "b"])]
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.add_(1)
    others.append(latents_of(pipe, images, ["a", "b"]))
    assert len({each.identity() for each in (data, *others)}) == 4
