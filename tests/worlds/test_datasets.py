"""Data as the training loop draws it."""

import pytest
import torch

from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.training.data import generator_for
from pared.worlds.datasets import Balanced, LatentData, balanced_weights, latents_of
from pared.worlds.house import folder_of


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


# Data from pipelines -----------------------------------------------------------------------------


def clip(projected: bool):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=2222, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=300, projection_dim=16,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def toy_pipeline(kind):
    """A stock pipeline of a family around toy parts, as a recipe packs it."""
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        PixArtSigmaPipeline,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
    )
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder_of("house:clip"), model_max_length=12)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    if kind == "pixart":
        model = presets.build("toy:pixart", device="cpu")
        return PixArtSigmaPipeline(
            tokenizer, clip(False), vae, model, DPMSolverMultistepScheduler()
        )
    if kind == "unet":
        model = presets.build("toy:unet", device="cpu")
        return StableDiffusionPipeline(
            vae, clip(False), tokenizer, model, DPMSolverMultistepScheduler(), None, None,
            requires_safety_checker=False,
        )  # fmt: skip
    model = presets.build("toy:sd3", device="cpu")
    encoders = clip(True), tokenizer, clip(True), tokenizer
    return StableDiffusion3Pipeline(
        model, FlowMatchEulerDiscreteScheduler(), vae, *encoders, None, None
    )


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("pixart", {"text": 16, "mask": None}),
        ("unet", {"text": 16}),
        ("sd3", {"text": 64, "pooled": 32}),
    ],
)
def test_the_pipeline_of_a_family_encodes_its_own_data(kind, entries):
    pipeline = toy_pipeline(kind)
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    data = latents_of(pipeline, images, ["red heart", "cat face", "rocket"], drop=0.5)
    batch = data.batch(torch.arange(3), generator_for(0))
    assert batch["latents"].shape == (3, 4, 8, 8)
    assert {n for n in batch if not n.startswith("latent")} == set(entries)
    for name, width in entries.items():
        assert len(batch[name]) == 3
        assert width is None or batch[name].shape[-1] == width


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
