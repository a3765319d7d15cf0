"""`pared sample`: pictures, their names, and what it can't paint."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from pared.cli import pictures
from tests.caching.pipelines import WAYS


def pixels(path):
    with Image.open(path) as image:
        return image.size, image.tobytes()


def test_one_picture(run, tmp_path, pipeline):
    result = run("sample", pipeline, "red apple", "--steps", 2, "-o", "new/apple.png")
    assert result.exit_code == 0, result.output
    assert result.stdout == "new/apple.png\n"
    assert pixels(tmp_path / "new" / "apple.png")[0] == (64, 64)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["apple.png"]


def test_several_pictures_and_their_sheet(run, tmp_path, pipeline):
    words = ["sample", pipeline, "red apple", "a fox, in snow!", "--steps", 2, "--guidance", 1]
    result = run(*words, "-o", "out")
    assert result.exit_code == 0, result.output
    names = ["01-red-apple.png", "02-a-fox-in-snow.png", "sheet.png"]
    assert result.stdout.splitlines() == [f"out/{name}" for name in names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    # A picture depends on its own prompt and the seed alone.
    run("sample", pipeline, "a fox, in snow!", "--steps", 2, "--guidance", 1, "-o", "fox.png")
    assert pixels(tmp_path / "fox.png") == pixels(tmp_path / "out" / names[1])
    assert pixels(tmp_path / "fox.png") != pixels(tmp_path / "out" / names[0])


def test_seed_size_and_type(run, tmp_path, pipeline):
    common = ["sample", pipeline, "x", "--steps", 1, "--height", 32, "--width", 48]
    run(*common, "-o", "a.png")
    run(*common, "--seed", 1, "-o", "b.png")
    result = run(*common, "--dtype", "bfloat16", "--device", "cpu", "-o", "c.png")
    assert result.exit_code == 0, result.output
    assert pixels(tmp_path / "a.png")[0] == (48, 32)
    assert pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")


def test_a_converted_pipeline(run, tmp_path, pipeline):
    run("convert", pipeline, "--with", "edit", "-o", "student")
    result = run("sample", "student", "red apple", "--steps", 1, "-o", "a.png")
    assert result.exit_code == 0, result.output


def test_a_student_that_reads_the_scale_is_called_once_a_step(run, student_calls):
    for scale, weight in ((["--guidance", 3], 2.0), ([], 3.5)):  # the pipeline's own is 4.5
        student_calls.clear()
        result = run("sample", "student", "red apple", "--steps", 2, *scale, "-o", "a.png")
        assert result.exit_code == 0, result.output
        assert student_calls == [(1, weight)] * 2


def test_classes(run, tmp_path):
    way = next(way for way in WAYS if way.family == "dit")
    way.build().save_pretrained(tmp_path / "classes")
    result = run("sample", "classes", 207, 360, "--steps", 2, "--guidance", 2, "-o", "out")
    assert result.exit_code == 0, result.output
    names = ["01-207.png", "02-360.png", "sheet.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert pixels(tmp_path / "out" / names[0]) != pixels(tmp_path / "out" / names[1])


def test_guidance_by_a_class_that_isnt_the_empty_one(run, tmp_path):
    way = next(way for way in WAYS if way.family == "dit")
    replace(way, config={"num_embeds_ada_norm": 10}).build().save_pretrained(tmp_path / "ten")
    words = ["sample", "ten", 7, "--steps", 1, "-o", "x.png"]
    result = run(*words)
    assert result.exit_code == 2 and not (tmp_path / "x.png").exists()
    assert "guides by class 1000, which of this model's 10 classes isn't" in result.stderr
    result = run(*words, "--guidance", 1)
    assert result.exit_code == 0, result.output


@pytest.fixture
def class_pipeline(tmp_path):
    """The index of a pipeline of classes, and of videos; no weights are needed to refuse them."""
    for name, kind in (("dit", "DiTPipeline"), ("wan", "WanPipeline")):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    # Of time, height and width.
    (tmp_path / "wan" / "transformer" / "config.json").write_text('{"patch_size": [1, 2, 2]}')


@pytest.mark.parametrize(
    "words, part",
    [
        (["PIPE", "-o", "x"], "missing argument 'PROMPT...'"),
        (["PIPE", "cat"], "missing option '-o' / '--output'"),
        (["toy:dit", "cat", "-o", "x"], "toy:dit is a configuration with random weights"),
        (["house:vae", "cat", "-o", "x"], "house:vae is a single model; painting needs a whole"),
        (["dit", "cat", "-o", "x"], "dit is a DiTPipeline, which takes no prompt but classes, and"),
        (["dit", "1000", "-o", "x"], "'1000' is none of them; give a number from 0 to 999"),
        (["dit", "7", "--scale", "2", "-o", "x"], "dit paints classes, which can't be refined"),
        (["dit", "7", "--height", "64", "-o", "x"], "which takes no --height"),
        (["wan", "cat", "-o", "x"], "wan is a WanPipeline, which makes videos; give a text-to-im"),
        (["wan", "cat", "-o", "x", "--height", "40"], "give a multiple of 16"),
        (["PIPE", "cat", "dog", "-o", "x.png"], "x.png is one picture, but there are 2 prompts"),
        (["PIPE", "cat", "-o", "dir.png"], "dir.png is a folder"),
        (["PIPE", "cat", "-o", "notes.txt"], "notes.txt is a file that isn't named .png"),
        (["PIPE", "cat", "-o", "notes.txt/x.png"], "notes.txt is a file"),
        (["PIPE", "cat", "-o", "x", "--steps", "0"], "0 is not in the range x>=1"),
        (["PIPE", "cat", "-o", "x", "--guidance", "-1"], "-1.0 is not in the range x>=0"),
        (["PIPE", "cat", "-o", "x", "--height", "60"], "--height 60 doesn't work"),
        (["PIPE", "cat", "-o", "x", "--width", "40"], "give a multiple of 16"),
        (["PIPE", "cat", "-o", "x", "--device", "tpu"], "there is no device 'tpu' here"),
        (["PIPE", "cat", "-o", "x", "--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (
            ["PIPE", "cat", "-o", "x", "--with", "edit"],
            "edit rebuilds a model; use `pared convert`",
        ),
        (["PIPE", "cat", "-o", "x", "--with", "edti"], "did you mean edit"),
    ],
)
def test_refusals(refused, tmp_path, pipeline, class_pipeline, words, part):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "dir.png").mkdir()
    assert part in refused("sample", *(pipeline if word == "PIPE" else word for word in words))


@pytest.mark.parametrize(
    "prompts, names",
    [
        (["red apple"], ["01-red-apple.png"]),
        (["", "../etc/passwd"], ["01-picture.png", "02-etc-passwd.png"]),
        (["猫 cat", "a" * 90], ["01-猫-cat.png", f"02-{'a' * 40}.png"]),
    ],
)
def test_file_names(prompts, names):
    assert pictures.file_names(prompts) == names


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    old = pictures.save(Image.new("RGB", (4, 4), "red"), tmp_path / "a.png")
    before = old.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    new = Image.new("RGB", (4, 4), "blue")
    monkeypatch.setattr(new, "save", full)
    with pytest.raises(
        pictures.InputError, match=r"could not be written \(No space left on device\)"
    ):
        pictures.save(new, old)
    assert old.read_bytes() == before
    assert list(tmp_path.iterdir()) == [old]


def test_the_sheet_shows_all_in_order():
    colours = ["red", "green", "blue", "black", "yellow"]
    sheet = pictures.sheet([Image.new("RGB", (8, 6), colour) for colour in colours])
    assert sheet.size == (3 * 12 + 4, 2 * 10 + 4)
    assert sheet.getpixel((4, 4)) == (255, 0, 0)
    assert sheet.getpixel((16, 14)) == (255, 255, 0)
    assert sheet.getpixel((39, 23)) == (255, 255, 255)
