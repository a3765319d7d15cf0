"""`pared edit`, `pared upscale`, `pared inpaint`: a picture in, a picture out, and refusals."""

import pytest
from PIL import Image

from pared.cli import pictures


@pytest.fixture(scope="module")
def taught(pipeline, tmp_path_factory):
    """The folder of a toy pipeline that was taught all tasks (though not well)."""
    import pared

    model = pared.load(pipeline)
    pared.convert(model, pared.parse("multi-task-upcycling:experts=2"))
    return pared.save(model, tmp_path_factory.mktemp("taught") / "model")


@pytest.fixture
def apple(tmp_path):
    return pictures.save(Image.new("RGB", (64, 48), "red"), tmp_path / "apple.png")


def size_of(path):
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize(
    ("command", "words", "size"),
    [
        ("edit", ["make it green"], (64, 48)),
        ("edit", ["make it green", "--size", 32], (32, 32)),
        ("inpaint", ["remove the apple"], (64, 48)),
        ("upscale", [], (256, 192)),
        ("upscale", ["red apple"], (256, 192)),
    ],
)
def test_a_picture_in_and_a_picture_out(run, tmp_path, taught, apple, command, words, size):
    result = run(command, taught, apple, *words, "--steps", 1, "-o", "new/out.png")
    assert result.exit_code == 0, result.output
    assert result.stdout == "new/out.png\n"
    assert size_of(tmp_path / "new" / "out.png") == size
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.png"]


def test_a_mask_keeps_what_it_does_not_cover(run, tmp_path, taught, apple):
    mask = Image.new("L", (64, 48))
    mask.paste(255, (8, 8, 24, 24))
    pictures.save(mask, tmp_path / "mask.png")
    words = ["inpaint", taught, apple, "remove the apple", "--mask", "mask.png", "--steps", 1]
    result = run(*words, "-o", "out.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out.png") as found:
        assert found.getpixel((40, 40)) == (255, 0, 0)


def test_the_seed_decides(run, tmp_path, taught, apple):
    common = ["edit", taught, apple, "make it green", "--steps", 1]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(*common, "--seed", seed, "-o", f"{name}.png").exit_code == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_refusals(refused, tmp_path, pipeline, taught, apple):
    (tmp_path / "text.png").write_text("no picture")
    pictures.save(Image.new("L", (8, 8), 255), tmp_path / "small.png")
    pictures.save(Image.new("L", (64, 48)), tmp_path / "black.png")
    words = ["make it green", "-o", "out.png"]
    assert "text.png can't be used: the image can't be decoded" in refused(
        "edit", taught, "text.png", *words
    )
    assert "none.png can't be used: no such file" in refused("edit", taught, "none.png", *words)
    assert "out.jpg isn't named .png" in refused("edit", taught, apple, "x", "-o", "out.jpg")
    assert "was not taught 'edit'" in refused("edit", pipeline, apple, *words)
    assert "needs a whole pipeline" in refused("edit", "toy:unet", apple, *words)
    inpaint = ["inpaint", taught, apple, "remove it", "-o", "out.png", "--mask"]
    assert "the mask is 8 x 8 pixels" in refused(*inpaint, "small.png")
    assert "the mask is all black" in refused(*inpaint, "black.png")
