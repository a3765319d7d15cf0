"""`pared train` and `pared heal`: runs that finish, stop and go on, and what is refused."""

import json
import os
import shlex
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pared
from pared import recipe as recipes
from pared.cli.heal import items_of, latents_for
from pared.training import loop, processes
from pared.worlds import emoji
from tests.recipes import pipelines as toys
from tests.signals import ctrl_c

RECIPE = """
name = "toy"
[model]
class = "diffusers.AutoencoderKL"
[model.config]
block_out_channels = [8]
norm_num_groups = 4
layers_per_block = 1
[data]
kind = "images"
[objective]
name = "autoencoding"
[[stages]]
size = 8
training = { steps = 2, batch_size = 2 }
[[stages]]
size = 16
training = { steps = 2, batch_size = 2 }
"""


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """Eight captions with random pictures: decoding the whole emoji world takes seconds."""
    captions = emoji.load(size=None).select(range(8))

    def load(split=None, size=64):
        noise = torch.Generator().manual_seed(size)
        images = torch.randint(256, (8, 3, size, size), generator=noise, dtype=torch.uint8)
        return replace(captions, images=images)

    monkeypatch.setattr(emoji, "load", load)


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "toy.toml").write_text(RECIPE)
    return tmp_path / "toy.toml"


@contextmanager
def interruption():
    """Ctrl-C in the middle of every step."""
    step = loop._Run.one_step

    def interrupted_step(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    with ctrl_c(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "one_step", interrupted_step)
        yield


def weights(folder):
    return pared.load(folder).state_dict()


def test_train(run, tmp_path, recipe):
    result = run("train", "toy.toml")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line]
    assert lines[0] == "toy: diffusers.AutoencoderKL, 4 steps in 2 stages, to runs/toy"
    assert lines[-1] == "trained: runs/toy/model"
    assert weights(tmp_path / "runs" / "toy" / "model")


def test_an_interrupted_training_goes_on_to_the_same_weights(run, tmp_path, recipe):
    run("train", recipe, "-o", "whole")
    with interruption():
        result = run("train", "toy.toml", "-o", "my runs")
    assert result.exit_code == 130
    assert "pared: stopped; go on with: pared train toy.toml -o 'my runs'\n" in result.stderr
    assert not (tmp_path / "my runs" / "model").exists()
    assert run("train", "toy.toml", "-o", "my runs").exit_code == 0
    whole, parts = weights(tmp_path / "whole" / "model"), weights(tmp_path / "my runs" / "model")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    "old, new, part",
    [
        ("[model]", "[model", "is not a TOML file"),
        ("steps = 2, batch", "stesp = 2, batch", "stages.0.training.steps"),
        ('kind = "images"', 'kind = "image"', "data.kind: Input should be 'image-text'"),
        (
            'kind = "images"',
            'kind = "latents"',
            "kind 'latents' needs a vae, a text_encoder and a pipeline",
        ),
        (
            'kind = "images"',
            'kind = "images"\nsource = "nope.x"',
            "there are no images at 'nope.x'",
        ),
        ('kind = "images"', 'kind = "images"\nheld = false', "small enough to be held"),
        ("size = 16", "size = 256", "size 256 is beyond the emoji world's 128 pixels"),
        (
            'class = "diffusers.AutoencoderKL"',
            "",
            "give either a class with its config or a pipeline",
        ),
        (
            'class = "diffusers.AutoencoderKL"\n[model.config]',
            'from = "x"\n[old]',
            "old: Extra inp",
        ),
        ("AutoencoderKL", "AutoencoderKLL", "no model class 'diffusers.AutoencoderKLL'"),
        ("diffusers.AutoencoderKL", "os.system", "there is no model class 'os.system'"),
        ("layers_per_block", "layer_per_block", "'layer_per_block'; did you mean layers_per_block"),
        ('name = "autoencoding"', 'name = "autoencoding"\nsettings = {lk = 1}', "argument 'lk'"),
        ("batch_size = 2 }\n[[", "batch_size = 2, warmup = 5 }\n[[", "warmup 5 must be shorter"),
    ],
)
def test_recipes_that_are_refused(refused, recipe, old, new, part):
    recipe.write_text(RECIPE.replace(old, new))
    assert part in refused("train", recipe)


def test_a_recipe_over_another(recipe):
    longer = recipe.with_name("longer.toml")
    longer.write_text("""
extends = "toy.toml"
name = "longer"
[model.config]
layers_per_block = 2
[[stages]]
size = 16
training = { steps = 9 }
""")
    base, plan = recipes.read(recipe), recipes.read(longer, ["stages.0.training.steps=8"])
    assert plan.name == "longer"
    assert plan.model.config == base.model.config | {"layers_per_block": 2}
    assert plan.objective == base.objective
    assert [stage.training.steps for stage in plan.stages] == [8]


@pytest.mark.parametrize(
    "line, part",
    [
        ('extends = "other.toml"', "other.toml can't be read (No such file or directory)"),
        ('extends = ["toy.toml"]', "extends: give the path of one recipe"),
        ('extends = "toy.toml"', "toy.toml extends itself"),
    ],
)
def test_extensions_that_are_refused(refused, recipe, line, part):
    recipe.write_text(line + RECIPE)
    assert part in refused("train", recipe)


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "missing argument 'RECIPE'"),
        (["nope.toml"], "nope.toml can't be read (No such file or directory)"),
        (["toy.toml", "-o", "toy.toml"], "toy.toml is a file"),
        (["toy.toml", "-o", "toy.toml/x"], "toy.toml is a file"),
    ],
)
def test_train_refusals(refused, recipe, words, part):
    assert part in refused("train", *words)


# Healing --------------------------------------------------------------------------------------


@pytest.fixture
def student(run, tmp_path, pipeline):
    result = run("convert", pipeline, "--with", "edit", "-o", "student")
    assert result.exit_code == 0, result.output
    return tmp_path / "student"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (80, 70), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {colour} square")
    return folder


def heal(run, pipeline, *more):
    words = ["--teacher", pipeline, "--data", "photos", "--batch-size", 2, "-o", "healed"]
    return run("heal", "student", *words, *more)


def test_heal(run, tmp_path, pipeline, student, photos):
    result = heal(run, pipeline, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "healed in 2 steps: healed\n" in result.stdout
    before = pared.load(student).transformer.state_dict()
    after = pared.load(tmp_path / "healed").transformer.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".attn1." in name for name in changed), "only what is new learns"
    log = (tmp_path / "healed.training" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 2


def test_half_precision_heals_in_float32_and_stays_half(run, tmp_path, pipeline, photos):
    """Of the teacher, too."""
    pared.save(pared.load(pipeline).to(torch.bfloat16), tmp_path / "half")
    result = run("convert", "half", "--with", "edit", "-o", "student")
    assert result.exit_code == 0, result.output
    result = heal(run, "half", "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "float32" not in result.output
    before, after = weights_of(tmp_path / "student"), weights_of(tmp_path / "healed")
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    words = ["--with", "edit", "--data", "photos", "--steps", 1, "--batch-size", 2, "--count", 1]
    result = run("layers", "half", *words, "--error", 1e9, "-o", "found")
    assert result.exit_code == 0, result.output
    found = weights_of(tmp_path / "found" / "model")
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}


def weights_of(folder):
    """Those of a pipeline's denoiser, as saved."""
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("here", [True, False])
def test_training_runs_on_an_accelerator_where_there_is_one(monkeypatch, here):
    asked = []
    monkeypatch.setattr(processes, "PartialState", lambda cpu: asked.append(cpu))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: here)
    processes.this_process()
    assert asked == [not here]


@pytest.mark.parametrize("words", [["heal", "student", "--teacher"], ["layers"]])
def test_encoders_are_taken_to_where_training_runs(run, pipeline, student, photos, words):
    moved, steps = [], ["--steps", 1, "--batch-size", 2, "--data", "photos", "-o", "out"]
    steps += ["--with", "edit", "--count", 1] if words == ["layers"] else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "to_accelerator", lambda pipe: moved.append(pipe) or pipe)
        result = run(*words, pipeline, *steps)
    assert result.exit_code == 0, result.output
    assert len(moved) == 1


def test_pictures_of_a_model_that_knows_no_size(photos):
    """FLUX's configuration has none: its pipeline paints 1024 pixels."""
    data = latents_for(toys.pipeline("flux"), list(items_of(str(photos)))[:1])
    assert data.latents.shape == (1, 16, 128, 128)


def test_an_interrupted_healing(run, tmp_path, pipeline, student, photos):
    with interruption():
        result = heal(run, pipeline, "--steps", 3)
    assert result.exit_code == 130
    assert (
        f"pared: stopped; go on with: pared heal student --teacher {pipeline} --data photos "
        "--steps 3 --batch-size 2 -o healed\n"
    ) in result.stderr
    assert not (tmp_path / "healed").exists()
    result = heal(run, pipeline, "--steps", 3)
    assert result.exit_code == 0, result.output
    assert "healed in 3 steps" in result.stdout


def test_a_model_of_several_tasks_is_not_healed_by_captions(run, tmp_path, pipeline, photos):
    run("convert", pipeline, "--with", "multi-task-upcycling", "-o", "student")
    result = heal(run, pipeline)
    assert result.exit_code == 2 and not (tmp_path / "healed.training").exists()
    told = "student does text-to-image, edit, upscale, inpaint, of which captioned images teach one"
    assert told in result.stderr


@pytest.mark.parametrize("spec, rate", [("edit", 1e-4), ("difffit", 1e-3)])
def test_a_method_heals_at_its_own_rate(run, tmp_path, pipeline, photos, spec, rate):
    run("convert", pipeline, "--with", spec, "-o", "student")
    assert heal(run, pipeline, "--steps", 1).exit_code == 0
    (line,) = (tmp_path / "healed.training" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["rate"] == rate


@pytest.mark.parametrize(
    "words, part",
    [
        (["student", "-o", "x"], "missing option '--teacher'"),
        (["student", "--teacher", "PIPE"], "missing option '-o' / '--output'"),
        (["nope", "--teacher", "PIPE", "-o", "x"], "there is no model 'nope'"),
        (["student", "--teacher", "nope", "-o", "x"], "there is no model 'nope'"),
        (["PIPE", "--teacher", "PIPE", "-o", "x"], "carries no conversion, so there is nothing to"),
        (["toy:dit", "--teacher", "PIPE", "-o", "x"], "toy:dit carries no conversion"),
        (["student", "--teacher", "toy:dit", "-o", "x"], "making the training data needs a whole"),
        (["student", "--teacher", "PIPE", "-o", "x", "--steps", "0"], "0 is not in the range x>=1"),
        (["student", "--teacher", "PIPE", "-o", "x", "--data", "nope.parquet"], "no file or"),
        (["student", "--teacher", "PIPE", "-o", "photos"], "photos holds something that is not"),
        (["student", "--teacher", "PIPE", "-o", "photos/a.png/x"], "a.png is a file"),
    ],
)
def test_heal_refusals(refused, pipeline, student, photos, words, part):
    assert part in refused("heal", *(pipeline if word == "PIPE" else word for word in words))


def test_layers(run, tmp_path, pipeline, photos):
    words = ["--with", "edit", "--data", "photos", "--steps", 2, "--batch-size", 2, "--count", 1]
    result = run("layers", pipeline, *words, "--error", 1e9, "-o", "found")
    assert result.exit_code == 0, result.output
    assert "edit:layers=[0,1]" in result.stdout
    curve = json.loads((tmp_path / "found" / "curve.json").read_text())
    assert [len(choice["layers"]) for choice in curve["choices"]] == [0, 1, 2]
    chosen = min(curve["choices"], key=lambda choice: choice["cost"])
    stack = pared.method.stack_of(pared.load(tmp_path / "found" / "model").transformer)
    assert [m.spec() for m in stack] == [s for s in [chosen["spec"]] if s]


def test_an_interrupted_search_of_layers_goes_on_with_all_that_was_given(
    run, tmp_path, pipeline, photos
):
    words = ["--with", "edit", "--data", "photos", "--steps", 3, "--batch-size", 2, "--count", 1]
    with interruption():
        result = run("layers", pipeline, *words, "--error", 1e9, "--json", "-o", "found")
    assert result.exit_code == 130
    again = result.stderr.splitlines()[-1].partition("go on with: pared ")[2]
    result = run(*shlex.split(again))
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["choices"]) == 3
    assert (tmp_path / "found" / "model").exists()


@pytest.mark.parametrize(
    "words, part",
    [
        (["--with", "nope", "-o", "x"], "there is no method 'nope'"),
        (["--with", "edit", "--data", "photos", "-o", "x"], "3 pictures and 64 are to be measured"),
    ],
)
def test_layers_refusals(refused, pipeline, photos, words, part):
    assert part in refused("layers", pipeline, *words)


HEAL = """
name = "healing"
[model]
from = "{pipeline}"
methods = ["edit"]
[data]
kind = "latents"
[objective]
name = "distillation"
[[stages]]
size = 64
training = {{ steps = 1, batch_size = 2, trainable = ["*.attn1.*"] }}
"""


def test_train_a_recipe_that_heals(run, tmp_path, pipeline):
    (tmp_path / "heal.toml").write_text(HEAL.format(pipeline=pipeline))
    result = run("train", "heal.toml", "-o", "out")
    assert result.exit_code == 0, result.output
    assert f"healing: {pipeline} with edit, 1 step in 1 stage, to out\n" in result.stdout
    assert (tmp_path / "out" / "model" / "pared.json").exists()


def test_a_recipe_on_pictures_of_ones_own(run, tmp_path, pipeline, photos):
    (tmp_path / "heal.toml").write_text(HEAL.format(pipeline=pipeline))
    changes = ("data.source=photos", "data.held=false", "stages.0.training.steps=2")
    words = [word for change in changes for word in ("--set", change)]
    with interruption():
        result = run("train", "heal.toml", "-o", "out", *words)
    assert result.exit_code == 130
    again = " ".join(f"--set {change}" for change in changes)
    assert f"go on with: pared train heal.toml -o out {again}\n" in result.stderr
    result = run("train", "heal.toml", "-o", "out", *words)
    assert result.exit_code == 0, result.output
    log = (tmp_path / "out" / "stage-1" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 2


@pytest.mark.parametrize(
    "change, part",
    [
        ("data.drop", "write PATH=VALUE"),
        ("stages.7.size=8", "no such place"),
        ("name.x=1", "no such place"),
        ("data.drop=2", "data.drop: Input should be less than or equal to 1"),
        ("data.balance=0.5", "only the emoji world knows concepts"),
    ],
)
def test_changes_that_are_refused(refused, tmp_path, pipeline, photos, change, part):
    text = HEAL.format(pipeline=pipeline).replace("[data]", '[data]\nsource = "photos"')
    (tmp_path / "heal.toml").write_text(text)
    assert part in refused("train", "heal.toml", "--set", change)


RECIPES = Path(__file__).parents[2] / "recipes"


# Those that start from what another one trains have tests of their own.
FIRST = [
    path for path in sorted(RECIPES.rglob("*.toml")) if 'from = "runs/' not in path.read_text()
]


@pytest.mark.parametrize("path", FIRST, ids=lambda path: path.stem)
def test_shipped_recipes_are_sound(path):
    recipes.check(recipes.read(path))


@pytest.mark.parametrize(
    "old, new, part",
    [
        ("PIPE", "nowhere", "there is no pipeline 'nowhere'; give house:NAME, a folder, or"),
        ("PIPE", "house:unicorn", "there is no house model 'house:unicorn'"),
        ('"edit"', '"edit:r=0"', "edit: r=0 doesn't work"),
        ('"edit"', '"edti"', "did you mean edit"),
        (
            'methods = ["edit"]',
            "",
            "the objective 'distillation' trains methods, and the model has none",
        ),
    ],
)
def test_healing_recipes_that_are_refused(refused, tmp_path, pipeline, old, new, part):
    text = HEAL.replace("{pipeline}", "PIPE").replace(old, new).replace("PIPE", str(pipeline))
    text = text.replace("{{", "{").replace("}}", "}")
    (tmp_path / "heal.toml").write_text(text)
    assert part in refused("train", "heal.toml")
