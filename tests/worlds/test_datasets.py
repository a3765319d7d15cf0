"""Data as the training loop draws it."""

from dataclasses import replace

import pytest
import torch
from tests.recipes.pipelines import pipeline, vae

from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.training.data import beside, generator_for
from pared.worlds.datasets import (
    Balanced,
    LatentData,
    balanced_weights,
    encode_latents,
    latents_of,
)


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
