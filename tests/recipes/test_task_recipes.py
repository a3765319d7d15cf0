"""Recipes that teach tasks: on users' own examples, from toy pipelines of the real classes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import pared
from pared import recipe
from pared.errors import InputError
from pared.method import denoiser, stack_of
from tests.recipes.pipelines import pipeline

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = [
    "stages.0.size=64",
    *(
        f"stages.0.training.{x}"
        for x in ("steps=2", "batch_size=4", "warmup=0", "log_every=1", "precision=no")
    ),
]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Captioned pictures, edits, and pictures with masks."""
    place = tmp_path_factory.mktemp("examples")
    for name in ("photos", "edits", "masks"):
        (place / name).mkdir()
    lines: dict[str, list[dict]] = {"edits": [], "masks": []}
    for number in range(4):
        noise = Image.effect_noise((80, 80), 20 + 10 * number).convert("RGB")
        noise.save(place / "photos" / f"{number}.png")
        (place / "photos" / f"{number}.txt").write_text(f"cat face {number}")
        noise.save(place / "edits" / f"a{number}.png")
        noise.rotate(180).save(place / "edits" / f"b{number}.png")
        lines["edits"] += [
            {"before": f"a{number}.png", "after": f"b{number}.png", "text": "turn it upside down"}
        ]
        noise.save(place / "masks" / f"{number}.png")
        mask = Image.new("L", (80, 80))
        mask.paste(255, (20, 20, 40, 40))
        mask.save(place / "masks" / f"m{number}.png")
        lines["masks"] += [
            {"image": f"{number}.png", "mask": f"m{number}.png", "text": "remove the cat"}
        ]
    for name, entries in lines.items():
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (place / name / "metadata.jsonl").write_text(text)
    return place


def sources(place):
    return [
        f"data.tasks.text-to-image={place / 'photos'}",
        f"data.tasks.edit={place / 'edits'}",
        f"data.tasks.upscale={place / 'photos'}",
        f"data.tasks.inpaint={place / 'masks'}",
    ]


def trained(name, family, changes, tmp_path):
    place = tmp_path / "base"
    pipeline(family).save_pretrained(place)
    read = recipe.read(RECIPES / name, [f"model.from={place}", *changes, *SHORT])
    return recipe.run(read, tmp_path / "out"), tmp_path / "out"


@pytest.mark.parametrize("family", ["unet", "pixart", "sd3"])
def test_four_tasks_in_one_denoiser(family, tmp_path, examples):
    name = "multi-task-upcycling/mini.toml"
    done, folder = trained(name, family, sources(examples), tmp_path)
    assert [m.info.slug for m in stack_of(denoiser(done))] == ["multi-task-upcycling"]
    again = pared.with_tasks(pared.load(folder / "model"))
    again.set_progress_bar_config(disable=True)
    picture = Image.effect_noise((64, 64), 30).convert("RGB")
    for task in ("edit", "upscale", "inpaint"):
        painted = again("turn it", image=picture, task=task, num_inference_steps=1).images[0]
        assert painted.size == ((256, 256) if task == "upscale" else (64, 64))
    log = [json.loads(x) for x in (folder / "stage-1" / "log.jsonl").read_text().splitlines()]
    assert "task" in log[-1]


@pytest.mark.parametrize("family", ["unet", "pixart"])
def test_editing_in_one_pass(family, tmp_path, examples):
    name = "explicit-conditioning/mini.toml"
    changes = [f"data.tasks.edit={examples / 'edits'}"]
    done, folder = trained(name, family, changes, tmp_path)
    assert [m.info.slug for m in stack_of(denoiser(done))] == ["explicit-conditioning"]
    again = pared.with_tasks(pared.load(folder / "model"))
    again.set_progress_bar_config(disable=True)
    calls = []
    denoiser(again).register_forward_pre_hook(lambda *_: calls.append(1))
    picture = Image.effect_noise((64, 64), 30).convert("RGB")
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    a, b, c = (
        again("turn it", image=picture, task="edit", num_inference_steps=2, generator=g).images[0]
        for g in seeds
    )
    assert len(calls) == 6
    assert a.tobytes() == b.tobytes() != c.tobytes()
    with pytest.raises(InputError, match=r"guidance scale of 3 doesn't work with explicit-cond"):
        again("turn it", image=picture, task="edit", guidance_scale=3.0)


def test_linear_attention_many_tasks_and_one_pass_in_one_denoiser(tmp_path, examples):
    methods = ["edit", "multi-task-upcycling", 'explicit-conditioning:tasks=["edit","upscale"]']
    changes = [f"model.methods={json.dumps(methods)}", "objective.name=explicit"]
    changes += sources(examples)
    name = "multi-task-upcycling/mini.toml"
    _, folder = trained(name, "pixart", changes, tmp_path)
    again = pared.with_tasks(pared.load(folder / "model"))
    again.set_progress_bar_config(disable=True)
    assert [m.info.slug for m in stack_of(denoiser(again))] == [
        "edit", "multi-task-upcycling", "explicit-conditioning",
    ]  # fmt: skip
    picture, calls = Image.effect_noise((64, 64), 30).convert("RGB"), []
    denoiser(again).register_forward_pre_hook(lambda *_: calls.append(1))
    for task in ("edit", "upscale"):
        again("turn it", image=picture, task=task, num_inference_steps=2)
    again("a cat", task="text-to-image", num_inference_steps=2, height=64, width=64)
    assert len(calls) == 6


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("*/*.toml")), ids=lambda p: "/".join(p.parts[-2:])
)
def test_every_recipe_is_well_formed(path):
    recipe.read(path)


BAD = [
    (["data.tasks.paint=emoji"], r"there is no task 'paint'"),
    (["data.kind=latents"], r"kind 'tasks' goes with a table \[data.tasks\]"),
    (["objective.name=contrastive"], r"methods are trained by the objectives"),
    (["model.methods=[]", "objective.name=explicit"], r"'explicit' trains methods, and the model"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_bad_recipes_are_refused_in_a_sentence(changes, words):
    with pytest.raises(InputError, match=words):
        recipe.read(RECIPES / "multi-task-upcycling" / "mini.toml", changes)


def test_examples_that_are_not_there():
    name = RECIPES / "multi-task-upcycling" / "mini.toml"
    read = recipe.read(name, ["data.tasks.edit=nowhere"])
    with pytest.raises(InputError, match="there are no images at 'nowhere'"):
        recipe.check(read)


def test_chances_of_going_without_are_those_of_the_tasks():
    name = RECIPES / "multi-task-upcycling" / "mini.toml"
    assert recipe.read(name, ["data.drop=0"]).data.drop == 0
    with pytest.raises(InputError, match="every task has its own chances"):
        recipe.read(name, ["data.drop=0.3"])
