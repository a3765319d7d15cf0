"""The shipped models: opened by plain diffusers, of the promised size, and better than chance."""

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pared import anatomy, checkpoint, recipe
from pared.errors import InputError
from pared.method import denoiser, stack_of
from pared.worlds import emoji, house
from pared.worlds.datasets import tokenize

RECIPES = Path(__file__).parents[2] / "recipes" / "house"

PLAIN = """
import sys, torch
from diffusers import DiffusionPipeline
folder, name = sys.argv[1:]
opening = {"sd3": {"text_encoder_3": None, "tokenizer_3": None}}  # goes without T5
calling = {"pixart": {"use_resolution_binning": False}}
pipe = DiffusionPipeline.from_pretrained(folder, **opening.get(name, {}))
pipe.set_progress_bar_config(disable=True)
image = pipe("red heart", num_inference_steps=2, generator=torch.Generator().manual_seed(0),
             height=64, width=64, **calling.get(name, {})).images[0]
assert "pared" not in sys.modules
assert image.size == (64, 64), image.size
parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
assert len(parts) == 4 if name == "sd3" else 3
assert {part.dtype for part in parts} == {torch.float32}
"""


@pytest.mark.parametrize("name", ["pixart", "sd3", "unet"])
def test_plain_diffusers_opens_the_teachers_without_pared(tmp_path, name):
    command = [sys.executable, "-c", PLAIN, house.folder_of(f"house:{name}"), name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_weights_fit_the_repository():
    sizes = [p.stat().st_size for p in house.ROOT.rglob("*.safetensors")]
    assert max(sizes) < 40e6 and sum(sizes) < 154e6


def test_all_that_is_shipped_says_where_it_comes_from():
    told = (house.ROOT / "README.md").read_text()
    for name in house.names():
        (line,) = (line for line in told.splitlines() if line.startswith(f"| `house:{name}` |"))
        path = line.split("|")[3].strip(" `")
        assert (RECIPES.parents[1] / path).is_file(), line


@pytest.mark.parametrize("name", ["pixart", "pixart-edit", "sd3", "unet"])
def test_models_with_shared_parts_are_put_together_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *names: tmp_path)
    folder = Path(house.folder_of(f"house:{name}"))
    assert folder.parent == tmp_path
    assert house.folder_of(f"house:{name}") == str(folder)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name for name, cls in index.items() if isinstance(cls, list) and cls[0]}
    assert parts == {p.name for p in folder.iterdir() if p.is_dir()}


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_what_is_put_together_is_what_was_saved(name):
    folder = Path(house.folder_of(f"house:{name}"))
    files = json.loads((folder / checkpoint.SIDECAR).read_text())["files"]
    assert files == {file: checkpoint.digest(folder / file) for file in files}
    assert "text_encoder/model.safetensors" in files


def test_where_links_are_refused_files_are_copied(tmp_path, monkeypatch):
    def refused(self, target):
        raise OSError("no privilege")

    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *names: tmp_path)
    monkeypatch.setattr(Path, "symlink_to", refused)
    folder = Path(house.folder_of("house:unet"))
    assert not any(p.is_symlink() for p in folder.rglob("*"))
    assert filecmp.cmp(
        folder / "vae" / "config.json", house.ROOT / "vae" / "config.json", shallow=False
    )


def test_a_cache_that_cant_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *names: tmp_path / "missing")
    with pytest.raises(InputError, match=r"house:sd3 has to be put together .* set HF_HOME"):
        house.folder_of("house:sd3")


def test_autoencoder_keeps_the_pictures():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(house.folder_of("house:vae")).eval()
    images = emoji.load(split="heldout", size=64).images[::12].float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        error = (vae.decode(latents).sample.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    psnr = 10 * torch.log10(4 / error)
    assert psnr.mean() > 31  # 33.6 dB when it was trained
    # The factor comes from the first training pictures; these here are people, mostly.
    assert (latents * vae.config.scaling_factor).std() == pytest.approx(1, abs=0.3)


def test_clip_finds_the_caption_of_a_picture():
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(house.folder_of("house:clip")).eval()
    tokenizer = CLIPTokenizer.from_pretrained(house.folder_of("house:clip"))
    world = emoji.load(split="train", size=64)
    world = world.select(torch.arange(0, len(world), 30))
    ids, mask = tokenize(tokenizer, world.captions)
    with torch.no_grad():
        logits = model(
            pixel_values=world.images.float() / 127.5 - 1, input_ids=ids, attention_mask=mask
        ).logits_per_image
    found = (logits.argmax(dim=1) == torch.arange(len(world))).float().mean()
    assert found > 0.5  # one in 120 by chance


def test_student_computes_what_it_computed_when_it_was_saved():
    student = checkpoint.load(house.folder_of("house:pixart-edit"), verify=True)
    assert [m.info.slug for m in stack_of(denoiser(student))] == ["edit"]


@pytest.mark.parametrize("task", ["edit", "upscale"])
def test_the_model_of_all_tasks_comes_nearer_to_what_is_wanted(task):
    from pared.tasks.sampling import sample
    from pared.worlds.emoji.edits import MAKERS

    pipeline = checkpoint.load(house.folder_of("house:tasks"), verify=True)
    pipeline.set_progress_bar_config(disable=True)
    examples = MAKERS[task](size=64, split="heldout", count=24)
    given, wanted = (examples.images[rows] for rows in (examples.before, examples.after))
    generator = torch.Generator().manual_seed(0)
    made = sample(pipeline, task, examples.texts, given, steps=2, generator=generator)

    def error(pictures):
        return (pictures - wanted.float() / 255).square().mean()

    assert error(made) < 0.75 * error(given.float() / 255)


def test_unknown_house_model():
    with pytest.raises(InputError, match="shipped are"):
        house.folder_of("house:mansion")


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_recipes_of_teachers_pack_pipelines_that_paint(name):
    plan = recipe.read(RECIPES / f"{name}.toml")
    model = recipe.build(plan.model)
    pipeline = recipe.pack(plan.pipeline, plan.data, model)
    pipeline.set_progress_bar_config(disable=True)
    condition = anatomy.of(model).encode(pipeline, ["", "red heart"])
    assert {len(entry) for entry in condition.values()} == {2}
    assert not torch.equal(condition["text"][0], condition["text"][1])
    image = pipeline("red heart", num_inference_steps=1, height=64, width=64).images[0]
    assert image.size == (64, 64)
