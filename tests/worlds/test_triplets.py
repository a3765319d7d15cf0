"""Reading users' own triplets of every layout, and saying by name what is wrong with them."""

import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from pared.errors import InputError
from pared.worlds.readers.triplets import COLUMNS, read_triplets

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(color=RED, format="PNG", size=(8, 8), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, format, **({"quality": 95} if mode == "RGB" else {}))
    return buffer.getvalue()


def mask(*box: int, size=(8, 8)) -> bytes:
    """White within a box."""
    buffer = io.BytesIO()
    image = Image.new("L", size, 0)
    if box:
        image.paste(255, box)
    image.save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def line(before="a.png", after="b.png", text="make it green", **more) -> dict:
    return {"before": before, "after": after, "text": text, **more}


def jpegs(*names: str) -> dict[str, bytes]:
    return {name: encoded((RED, GREEN)[n % 2], "JPEG") for n, name in enumerate(names)}


def seen(examples) -> list[tuple]:
    """Which colour turns into which, and the texts."""
    names = ("red", "green", "blue")
    channel = [names[n] for n in examples.images.float().mean(dim=(2, 3)).argmax(1).tolist()]
    ends = zip(examples.before, examples.after, examples.texts, strict=True)
    return [(channel[before], channel[after], text) for before, after, text in ends]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` writes within the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


# A folder with a list


def test_listed_pairs(tmp_path):
    files = {
        "a.png": encoded(),
        "sub/b.png": encoded(GREEN),
        "metadata.jsonl": lines(
            line(after="sub/b.png", text=" make it green "),
            line("sub/b.png", "a.png", "make it red"),
        ),
    }
    examples = read_triplets(fill(tmp_path, files), 4)
    assert examples.task == "edit" and examples.captions is None
    assert examples.images.dtype == torch.uint8
    assert examples.images.shape == (2, 3, 4, 4), "each picture is held once"
    assert seen(examples) == [("red", "green", "make it green"), ("green", "red", "make it red")]


def test_captions_are_kept_where_all_have_them(tmp_path):
    both = {"caption_before": "red heart", "caption_after": "green heart"}
    files = {"a.png": encoded(), "b.png": encoded(GREEN)}
    fill(tmp_path, files | {"metadata.jsonl": lines(line(**both), line(**both))})
    assert read_triplets(tmp_path, 8).captions == [("red heart", "green heart")] * 2
    fill(tmp_path, {"metadata.jsonl": lines(line(**both), line(caption_before="red heart"))})
    assert read_triplets(tmp_path, 8).captions is None


def test_pictures_are_cut_to_the_middle_square(tmp_path):
    wide = Image.new("RGB", (24, 8), GREEN)
    wide.paste(RED, (8, 0, 16, 8))
    wide.save(tmp_path / "a.png")
    fill(tmp_path, {"b.png": encoded(BLUE, size=(24, 8)), "metadata.jsonl": lines(line())})
    examples = read_triplets(tmp_path, 8)
    assert seen(examples) == [("red", "blue", "make it green")]
    assert (examples.images[0, 0] == 255).all()


def test_the_task_can_be_named(tmp_path):
    files = {"a.png": encoded(), "b.png": encoded(GREEN), "metadata.jsonl": lines(line())}
    assert read_triplets(fill(tmp_path, files), 8, task="upscale").task == "upscale"
    with pytest.raises(InputError, match="no task 'edits'; did you mean edit"):
        read_triplets(tmp_path, 8, task="edits")


def test_masks_blank_what_is_to_be_filled_in(tmp_path):
    entry = {"image": "a.png", "mask": "mask.png", "text": "remove the hat"}
    files = {"a.png": encoded(), "mask.png": mask(0, 0, 4, 8), "metadata.jsonl": lines(entry)}
    examples = read_triplets(fill(tmp_path, files), 8)
    assert examples.task == "inpaint" and examples.texts == ["remove the hat"]
    before, after = examples.images[examples.before[0]], examples.images[examples.after[0]]
    assert (before[:, :, :4] == 128).all() and torch.equal(before[:, :, 4:], after[:, :, 4:])
    assert (after[0] == 255).all() and (after[1:] == 0).all()


# InstructPix2Pix

PROMPT = json.dumps({"input": "a cat", "edit": "make it a dog", "output": "a dog", "url": "x"})


def test_instruct_pix2pix_with_seeds(tmp_path):
    files = {
        "seeds.json": json.dumps([["0001", ["12", 34]], ["0002", ["56"]]]),
        "0001/prompt.json": PROMPT,
        "0002/prompt.json": PROMPT,
        **jpegs("0001/12_0.jpg", "0001/12_1.jpg", "0001/34_0.jpg", "0001/34_1.jpg"),
        **jpegs("0001/99_0.jpg", "0001/99_1.jpg", "0002/56_0.jpg", "0002/56_1.jpg"),
    }
    examples = read_triplets(fill(tmp_path, files), 8)
    assert seen(examples) == [("red", "green", "make it a dog")] * 3
    assert examples.captions == [("a cat", "a dog")] * 3


def test_instruct_pix2pix_without_seeds_takes_all(tmp_path):
    files = {"0001/prompt.json": PROMPT, **jpegs("0001/12_0.jpg", "0001/12_1.jpg")}
    files |= jpegs("0001/99_0.jpg", "0001/99_1.jpg")
    assert len(read_triplets(fill(tmp_path, files), 8)) == 2


def test_bad_prompts_and_missing_halves_are_named(tmp_path):
    files = {
        "a/prompt.json": PROMPT, **jpegs("a/1_0.jpg", "a/1_1.jpg", "a/2_0.jpg"),
        "b/prompt.json": "{", **jpegs("b/1_0.jpg", "b/1_1.jpg"),
        "c/prompt.json": json.dumps({"input": "a cat"}), **jpegs("c/1_0.jpg", "c/1_1.jpg"),
    }  # fmt: skip
    with pytest.raises(InputError) as refusal:
        read_triplets(fill(tmp_path, files), 8)
    for name in (
        "3 of 4 items",
        "a/2 (after: no such file)",
        "b/prompt.json (no instruction: it can't be read)",
        "c/1 (no instruction)",
    ):
        assert name in str(refusal.value)


@pytest.mark.parametrize("content", ["{", "{}", '["0001"]', "[[1, 2]]"])
def test_bad_seeds(tmp_path, content):
    with pytest.raises(InputError, match=r"seeds\.json' .*\[\[\"0000000\""):
        read_triplets(fill(tmp_path, {"seeds.json": content}), 8)


# GQA-Inpaint


def thing(name: str, removed: bool = True) -> dict:
    return {"name": name, "bidirected": removed, "attributes": ["old"], "relations": []}


SCENES = {
    "7": {
        "objects": {
            "1": thing("cup"), "2": thing("cat"), "3": thing("cat"), "4": thing("tree"),
            "5": thing("tree"), "6": thing("sky", removed=False),
        },
        "image_relative_positions": {
            "2": "to the left", "3": "to the right", "4": "to the left", "5": "to the left",
        },
    }
}  # fmt: skip


@pytest.fixture
def gqa(tmp_path):
    pictures = {f"images_inpainted/7/{n}.jpg": encoded(GREEN, "JPEG") for n in range(1, 7)}
    files = {"images/7.jpg": encoded(RED, "JPEG"), "train_scenes.json": json.dumps(SCENES)}
    return fill(tmp_path, files | pictures)


def test_gqa_inpaint_of_scenes(gqa):
    examples = read_triplets(gqa, 8)
    assert examples.task == "inpaint" and len(examples.images) == 2
    texts = ["remove the cup", "remove the cat at the left", "remove the cat at the right"]
    assert seen(examples) == [("red", "green", text) for text in texts]


def test_gqa_inpaint_of_instructions(gqa):
    fill(gqa, {"test_instructions.json": '{"i7-o4": "remove the tree behind the cup"}'})
    examples = read_triplets(gqa / "test_instructions.json", 8)
    assert seen(examples) == [("red", "green", "remove the tree behind the cup")]


def test_gqa_inpaint_says_what_is_missing(gqa):
    (gqa / "images_inpainted/7/1.jpg").unlink()
    with pytest.raises(InputError, match=r"i7-o1 \(after: no such file\)"):
        read_triplets(gqa, 8)
    with pytest.raises(InputError, match=r"no file .*other\.json'"):
        read_triplets(gqa / "other.json", 8)
    for content, message in (("[", "can't be read"), ("[]", "no JSON like"), ('{"7": {}}', "'7'")):
        with pytest.raises(InputError, match=message):
            read_triplets(fill(gqa, {"train_scenes.json": content}), 8)


# Tables


def table(datasets, columns, pairs, texts, captions=True):
    first, text, second = columns
    cells = {
        first: [before and {"bytes": before, "path": None} for before, _ in pairs],
        text: texts,
        second: [{"bytes": after, "path": None} for _, after in pairs],
    }
    if captions:
        cells |= {
            "original_prompt": ["a cat"] * len(texts),
            "edited_prompt": ["a dog"] * len(texts),
        }
    kinds = {name: datasets.Value("string") for name in cells}
    kinds |= {first: datasets.Image(), second: datasets.Image()}
    return datasets.Dataset.from_dict(cells, features=datasets.Features(kinds))


@pytest.mark.parametrize("columns", COLUMNS)
def test_tables(tmp_path, own_cache, columns):
    rows = table(own_cache, columns, [(encoded(), encoded(GREEN))], ["make it green"])
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "rows.parquet")
    for source in (tmp_path / "saved", tmp_path / "rows.parquet"):
        examples = read_triplets(source, 8)
        assert seen(examples) == [("red", "green", "make it green")]
        assert examples.captions == [("a cat", "a dog")]


def test_bad_rows_are_named(tmp_path, own_cache):
    pairs = [
        (None, encoded()),
        (b"broken", encoded()),
        (encoded(), encoded()),
        (encoded(GREEN),) * 2,
    ]
    rows = table(own_cache, COLUMNS[0], pairs, ["a", "b", None, "d"], captions=False)
    rows.save_to_disk(tmp_path / "saved")
    with pytest.warns(UserWarning) as caught:
        examples = read_triplets(tmp_path / "saved", 8, on_bad="skip")
    for name in (
        "row 0 (no before)",
        "row 1 (before: the image can't be decoded)",
        "row 2 (no instruction)",
    ):
        assert name in str(caught[0].message)
    assert seen(examples) == [("green", "green", "d")] and examples.captions is None


def test_tables_without_the_columns(tmp_path, own_cache):
    own_cache.Dataset.from_dict({"a": ["x"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="columns a; triplets need original_image, edit_prompt"):
        read_triplets(tmp_path / "saved", 8)


# Bad triplets

BAD = {
    "a.png": encoded(),
    "b.png": encoded(GREEN),
    "big.png": encoded(size=(16, 8)),
    "cut.png": encoded(size=(64, 64))[:60],
    "alone.png": encoded(),
    "none.png": mask(),
    "small.png": mask(0, 0, 2, 2, size=(4, 4)),
    "metadata.jsonl": lines(
        line(),
        line(after="big.png"),
        line(text=" "),
        line(text=None),
        line(before="cut.png"),
        line(before="gone.png"),
        {"image": "a.png", "mask": "none.png", "text": "x"},
        {"image": "a.png", "mask": "small.png", "text": "x"},
    ),
}
NAMED = [
    "8 of 9 items",
    "line 2 a.png (8x8 pixels before but 16x8 after)",
    "line 3 a.png (no instruction)",
    "line 4 a.png (no instruction)",
    "line 5 cut.png (before: the image can't be decoded)",
    "line 6 gone.png (before: no such file)",
]
REST = [
    "line 7 a.png (the mask marks nothing in white)",
    "line 8 a.png (the mask is 4x4 pixels, the image 8x8)",
    "alone.png (not listed in metadata.jsonl)",
]


def test_bad_triplets_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(InputError) as refusal:
        read_triplets(fill(tmp_path, BAD), 8)
    assert all(name in str(refusal.value) for name in NAMED)
    monkeypatch.setattr("pared.worlds.readers.items.NAMED", 20)
    with pytest.raises(InputError) as refusal:
        read_triplets(tmp_path, 8)
    assert all(name in str(refusal.value) for name in NAMED + REST)


def test_bad_triplets_are_skipped_with_one_warning(tmp_path):
    with pytest.warns(UserWarning) as caught:
        examples = read_triplets(fill(tmp_path, BAD), 8, on_bad="skip")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(name in str(caught[0].message) for name in NAMED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert seen(examples) == [("red", "green", "make it green")]


def test_nothing_left_after_skipping(tmp_path):
    fill(tmp_path, {"metadata.jsonl": lines(line())})
    with pytest.raises(InputError, match="at least one item needs two pictures of one size"):
        read_triplets(tmp_path, 8, on_bad="skip")


@pytest.mark.parametrize(
    "content", ["{", '"a"', '{"before": "a.png"}', '{"image": "a.png"}', "[3]"]
)
def test_bad_metadata_line(tmp_path, content):
    fill(tmp_path, {"metadata.jsonl": "\n" + content + "\n"})
    with pytest.raises(InputError, match=r"line 2 of .*each line must be a JSON object like"):
        read_triplets(tmp_path, 8)


def test_sources_without_triplets(tmp_path):
    with pytest.raises(InputError, match=r"holds no triplets; expected a metadata\.jsonl"):
        read_triplets(tmp_path, 8)
    for empty in ({"metadata.jsonl": "\n"}, {"seeds.json": "[]"}):
        folder = fill(tmp_path / next(iter(empty)), empty)
        with pytest.raises(InputError, match="holds no triplets; give a source of pictures"):
            read_triplets(folder, 8)
    with pytest.raises(InputError, match="no file or folder"):
        read_triplets(str(tmp_path / "gone"), 8)
    with pytest.raises(InputError, match="on_bad can't be 'ignore'"):
        read_triplets(tmp_path, 8, on_bad="ignore")
    with pytest.raises(InputError, match="size 0; the size must be at least 1"):
        read_triplets(tmp_path, 0)
