"""The autoencoder's loss, term by term, and the scale that its latents get behind training."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch.distributions import Normal, kl_divergence

from pared import recipe
from pared.objectives.autoencoding import Autoencoding
from pared.worlds.datasets import ImageData, encode_latents, fitted
from pared.worlds.readers import read

CONFIG = {"block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}


def toy():
    torch.manual_seed(0)
    return AutoencoderKL(**CONFIG)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, *size):
    return torch.randint(256, (count, 3, *size), generator=seeded(), dtype=torch.uint8)


@torch.no_grad()
def test_terms_by_definition():
    """Weights apart, so that none can take another's place; pictures that aren't square."""
    model = toy()
    batch = ImageData(pictures(2, 12, 20), flip=False).batch(torch.arange(2), seeded())
    terms = Autoencoding(kl=2, gradient=3, square=5)(model, batch, seeded(1))
    pixels = batch["pixel_values"]
    posterior = model.encode(pixels).latent_dist
    again = model.decode(posterior.sample(generator=seeded(1))).sample
    across, down = (
        F.l1_loss(again[here] - again[there], pixels[here] - pixels[there])
        for here, there in (
            ((..., slice(1, None)), (..., slice(-1))),
            ((..., slice(1, None), slice(None)), (..., slice(-1), slice(None))),
        )
    )
    kl = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0, 1)).mean()
    wanted = {
        "pixels": F.l1_loss(again, pixels),
        "square": 5 * F.mse_loss(again, pixels),
        "gradient": 3 * (across + down),
        "kl": 2 * kl,
    }
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value, msg=lambda told, n=name: f"{n}: {told}")


@torch.no_grad()
def test_latents_are_drawn_by_the_generator_alone():
    model, batch = toy(), {"pixel_values": torch.zeros(1, 3, 8, 8)}
    first, second, other = (Autoencoding()(model, batch, seeded(n))["pixels"] for n in (1, 1, 2))
    assert first == second != other


def test_the_scale_of_latents():
    """Of the first `count` pictures alone: 1 / std of what they're encoded to."""
    model, images = toy(), pictures(4, 8, 8)
    bright = torch.full_like(images, 255)
    before = model.config.scaling_factor
    recipe.set_scaling_factor(model, torch.cat([images, bright]), count=4)
    assert model.config.scaling_factor != before
    # The factor is rounded to five digits behind the point.
    assert encode_latents(model, images)[0].std() == pytest.approx(1, abs=1e-4)


def test_what_a_recipe_trains_has_latents_of_unit_scale(tmp_path):
    (photos := tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((20, 20), 60).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text("noise")
    (tmp_path / "vae.toml").write_text(f"""
name = "toy-vae"
[model]
class = "diffusers.AutoencoderKL"
[data]
kind = "images"
source = "{photos}"
[objective]
name = "autoencoding"
[[stages]]
size = 8
training = {{ steps = 1, batch_size = 2 }}
[[stages]]
size = 16
training = {{ steps = 1, batch_size = 2 }}
""")
    changes = [f"model.config.{name}={value}" for name, value in CONFIG.items()]
    recipe.run(recipe.read(tmp_path / "vae.toml", changes), tmp_path / "out")
    saved = AutoencoderKL.from_pretrained(tmp_path / "out" / "model")
    latents, _ = encode_latents(saved, fitted(read(photos), 16))
    assert latents.std() == pytest.approx(1, abs=1e-4)
