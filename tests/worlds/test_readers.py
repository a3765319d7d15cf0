"""Reading users' own captioned images, and saying by name what is wrong with them."""

import io
import json
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pared.errors import InputError
from pared.worlds import emoji
from pared.worlds.readers import read

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(color=RED, format="PNG", size=(8, 8), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, format, **options)
    return buffer.getvalue()


def noisy_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "JPEG")
    return buffer.getvalue()


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def shard(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def seen(items) -> list[tuple]:
    return [(item.key, item.caption, item.image.getpixel((0, 0))) for item in items]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` writes within the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


# Folders


def test_folder_with_metadata(tmp_path):
    metadata = lines(
        {"file_name": "b.png", "text": " blue "}, {"file_name": "sub/a.jpg", "caption": "red"}
    )
    fill(tmp_path, {"b.png": encoded(BLUE), "sub/a.jpg": encoded(), "metadata.jsonl": metadata})
    items = read(tmp_path)
    assert len(items) == 2
    assert [(key, caption) for key, caption, _ in seen(items)] == [
        ("b.png", "blue"),
        ("sub/a.jpg", "red"),
    ]
    assert seen(items) == seen(items), "a second pass gives the same"
    assert all(item.image.mode == "RGB" for item in items)


def test_metadata_in_a_subfolder_names_files_beside_it(tmp_path):
    metadata = lines({"file_name": "./a.png", "text": "red"})
    fill(tmp_path, {"train/a.png": encoded(), "train/metadata.jsonl": metadata})
    roundabout = str(tmp_path / "train" / "..")
    for source in (str(tmp_path), roundabout):
        assert seen(read(source)) == [("train/a.png", "red", RED)]


def test_columns_of_metadata_can_be_named(tmp_path):
    metadata = lines({"picture": "a.png", "prompt": "red", "text": "not this"})
    fill(tmp_path, {"a.png": encoded(), "metadata.jsonl": metadata})
    items = read(tmp_path, image_column="picture", caption_column="prompt")
    assert seen(items) == [("a.png", "red", RED)]


def test_datasets_reads_the_same_folder_alike(tmp_path, own_cache):
    metadata = lines({"file_name": "a.png", "text": "red"}, {"file_name": "b.png", "text": "blue"})
    folder = fill(
        tmp_path / "data",
        {"a.png": encoded(), "b.png": encoded(BLUE), "metadata.jsonl": metadata},
    )
    rows = own_cache.load_dataset("imagefolder", data_dir=str(folder), split="train")
    theirs = [(row["text"], row["image"].convert("RGB").getpixel((0, 0))) for row in rows]
    assert theirs == [(caption, pixel) for _, caption, pixel in seen(read(folder))]


def test_folder_with_text_files(tmp_path):
    fill(
        tmp_path,
        {
            "a.PNG": encoded(),
            "a.txt": "\ufeffred\n",
            "deep/b.webp": encoded(GREEN, "WEBP", lossless=True),
            "deep/b.txt": "green",
            ".hidden.png": b"",
            "notes.md": "no image",
        },
    )
    assert seen(read(tmp_path)) == [("a.PNG", "red", RED), ("deep/b.webp", "green", GREEN)]


# Line separators that only JSON takes for ordinary characters are the point of this one.
@settings(max_examples=30, deadline=None)
@given(caption=st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip))
def test_any_caption_survives(caption):
    with tempfile.TemporaryDirectory() as folder:
        metadata = json.dumps({"file_name": "a.png", "text": caption}, ensure_ascii=False)
        fill(Path(folder), {"a.png": encoded(), "metadata.jsonl": metadata})
        assert [item.caption for item in read(folder)] == [caption.strip()]


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    """Pillow's own conversion cuts off at 255."""
    levels = np.linspace(0, 65535, 16).astype(np.uint16).repeat(4).reshape(8, 8)
    for suffix in ("png", "tiff"):
        Image.fromarray(levels).save(tmp_path / f"{suffix}.{suffix}")
        (tmp_path / f"{suffix}.txt").write_text("a ramp")
    for item in read(tmp_path):
        assert (np.asarray(item.image)[..., 1] == levels // 257).all()
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "depth.tiff")
    (tmp_path / "depth.txt").write_text("a depth map")
    with pytest.raises(InputError, match=r"depth.tiff \(its grey levels are of no known range\)"):
        read(tmp_path)


def test_a_table_beside_captioned_images_hides_none(tmp_path):
    """As img2dataset writes it: what it knows of each image, and no image."""
    photo = encoded(format="JPEG")
    fill(tmp_path, {"00000/a.jpg": photo, "00000/a.txt": "x", "00000.parquet": "what it knows"})
    assert [item.caption for item in read(tmp_path)] == ["x"]


def test_transparent_parts_become_white(tmp_path):
    fill(tmp_path, {"a.png": encoded((255, 0, 0, 0), mode="RGBA"), "a.txt": "nothing"})
    assert seen(read(tmp_path)) == [("a.png", "nothing", (255, 255, 255))]


def test_photos_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    fill(tmp_path, {"a.jpg": encoded(format="JPEG", size=(16, 8), exif=exif), "a.txt": "tall"})
    assert next(iter(read(tmp_path))).image.size == (8, 16)


def test_items_can_be_drawn_at_random(tmp_path, own_cache):
    folder = fill(
        tmp_path / "photos",
        {
            "a.png": encoded(RED), "a.txt": "red",
            "b.png": b"broken", "b.txt": "nothing",
            "c.png": encoded(BLUE), "c.txt": "blue",
        },
    )  # fmt: skip
    with pytest.warns(UserWarning, match="b.png"):
        items = read(folder, on_bad="skip")
    assert [items[index].caption for index in (1, 0)] == ["blue", "red"]
    assert [items[n].caption for n in range(len(items))] == [item.caption for item in items]


@pytest.mark.parametrize("files", [{}, {"notes.txt": "text"}, {".hidden.png": encoded()}])
def test_folder_without_images(tmp_path, files):
    with pytest.raises(InputError, match=r"holds no images; expected files like \.jpg"):
        read(fill(tmp_path, files))


@pytest.mark.parametrize("line", ["{not json", '"text"', '{"text": "no file"}', '{"file_name": 3}'])
def test_bad_metadata_line(tmp_path, line):
    good = lines({"file_name": "a.png", "text": "red"})
    fill(tmp_path, {"a.png": encoded(), "metadata.jsonl": good + "\n" + line + "\n"})
    for on_bad in ("refuse", "skip"):
        with pytest.raises(InputError, match=r"line 3 of .*each line must be a JSON object"):
            read(tmp_path, on_bad=on_bad)


def test_metadata_that_is_not_utf8(tmp_path):
    fill(tmp_path, {"a.png": encoded(), "metadata.jsonl": "é".encode("latin-1")})
    with pytest.raises(InputError, match="isn't UTF-8"):
        read(tmp_path)


def test_column_without_metadata(tmp_path):
    fill(tmp_path, {"a.png": encoded(), "a.txt": "red"})
    with pytest.raises(InputError, match=r"no metadata\.jsonl to take columns from"):
        read(tmp_path, caption_column="prompt")


# Bad items

BAD_FOLDER = {
    "cut.jpg": noisy_jpeg()[:900],
    "cut.txt": "a photo",
    "empty.png": encoded(),
    "empty.txt": " \n",
    "good.png": encoded(),
    "good.txt": "red",
    "latin.png": encoded(),
    "latin.txt": "é".encode("latin-1"),
    "lone.png": encoded(),
    "noimage.png": b"not an image",
    "noimage.txt": "a photo",
}
BAD_NAMED = [
    "5 of 6 items",
    "cut.jpg (the image can't be decoded)",
    "empty.png (no caption)",
    "latin.png (no caption: latin.txt isn't UTF-8 text)",
    "lone.png (no caption: lone.txt is missing)",
    "noimage.png (the image can't be decoded)",
]


def test_bad_items_are_refused_by_name(tmp_path):
    with pytest.raises(InputError) as refusal:
        read(fill(tmp_path, BAD_FOLDER))
    assert all(name in str(refusal.value) for name in BAD_NAMED)
    assert "on_bad='skip'" in str(refusal.value)


def test_bad_items_are_skipped_with_one_warning(tmp_path):
    with pytest.warns(UserWarning) as caught:
        items = read(fill(tmp_path, BAD_FOLDER), on_bad="skip")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(name in str(caught[0].message) for name in BAD_NAMED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(items) == 1 and seen(items) == [("good.png", "red", RED)]


def test_bad_metadata_entries_are_named(tmp_path):
    metadata = lines({"file_name": "gone.png", "text": "x"}, {"file_name": "mute.png", "tag": "x"})
    images = dict.fromkeys(("mute.png", "unlisted.png"), encoded())
    fill(tmp_path, {**images, "metadata.jsonl": metadata})
    with pytest.raises(InputError) as refusal:
        read(tmp_path)
    for name in (
        "3 of 3 items",
        "gone.png (no such file)",
        "mute.png (no caption under 'text' or 'caption')",
        "unlisted.png (not listed in metadata.jsonl)",
    ):
        assert name in str(refusal.value)


def test_only_the_first_few_are_named(tmp_path):
    fill(tmp_path, {f"{number:02}.png": encoded() for number in range(40)})
    with pytest.raises(InputError) as refusal:
        read(tmp_path)
    message = str(refusal.value)
    assert "40 of 40" in message and "04.png" in message and "05.png" not in message


def test_nothing_left_after_skipping(tmp_path):
    fill(tmp_path, {"a.png": encoded()})
    with pytest.raises(InputError, match="at least one item needs an image and a caption"):
        read(tmp_path, on_bad="skip")


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 0.9))
def test_a_photo_cut_anywhere_is_found(share):
    photo = noisy_jpeg()
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), {"a.jpg": photo[: int(share * len(photo))], "a.txt": "noise"})
        with pytest.raises(InputError, match=r"a\.jpg \(the image can't be decoded\)"):
            read(folder)


def test_on_bad_is_checked(tmp_path):
    with pytest.raises(InputError, match="on_bad can't be 'ignore'; it is 'refuse' or 'skip'"):
        read(tmp_path, on_bad="ignore")


# Datasets


def rows(datasets, **columns):
    image = {"image": datasets.Image()} if "image" in columns else {}
    features = {name: datasets.Value("string") for name in columns} | image
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def stored(image: bytes | None, path: str | None = None) -> dict:
    return {"bytes": image, "path": path}


def test_saved_dataset(tmp_path, own_cache):
    images = [stored(encoded(), "a.png"), stored(encoded(BLUE))]
    table = rows(own_cache, image=images, label=["x", "y"], caption=["red", "blue"])
    table.save_to_disk(tmp_path / "saved")
    assert seen(read(tmp_path / "saved")) == [("row 0 a.png", "red", RED), ("row 1", "blue", BLUE)]
    assert [i.caption for i in read(tmp_path / "saved", caption_column="label")] == ["x", "y"]


def test_folder_of_parquet(tmp_path, own_cache):
    table = rows(own_cache, image=[stored(encoded())], words=["red"])
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train.parquet")
    assert seen(read(tmp_path / "data")) == [("row 0", "red", RED)]


def test_the_emoji_file_itself(own_cache):
    items = read(emoji.FILE)
    first = next(iter(items))
    assert (
        len(items) == 3783 and first.caption == "grinning face" and first.image.size == (128, 128)
    )


def test_splits(tmp_path, own_cache):
    one = rows(own_cache, image=[stored(encoded())], text=["red"])
    two = rows(own_cache, image=[stored(encoded(BLUE))], text=["blue"])
    own_cache.DatasetDict(test=one, train=two).save_to_disk(tmp_path / "train")
    own_cache.DatasetDict(test=one).save_to_disk(tmp_path / "only")
    own_cache.DatasetDict(a=one, b=two).save_to_disk(tmp_path / "neither")
    assert seen(read(tmp_path / "train")) == [("row 0", "blue", BLUE)]
    assert seen(read(tmp_path / "only")) == [("row 0", "red", RED)]
    with pytest.raises(InputError, match="has the splits a, b; it must have a split 'train'"):
        read(tmp_path / "neither")


def test_columns_that_cannot_be_told(tmp_path, own_cache):
    table = rows(own_cache, image=[stored(encoded())], one=["x"], two=["y"])
    table.save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"\(image, one, two\) as caption_column"):
        read(tmp_path / "saved")
    with pytest.raises(InputError, match="no column 'three'; its columns are: image, one, two"):
        read(tmp_path / "saved", caption_column="three")
    with pytest.raises(InputError, match=r"'image' .* is no text; its text columns are: one, two"):
        read(tmp_path / "saved", caption_column="image")


def test_bad_rows_are_named(tmp_path, own_cache):
    images = [stored(noisy_jpeg()[:900], "cut.jpg"), None, stored(encoded()), stored(encoded())]
    table = rows(own_cache, image=images, text=["a", "b", None, "red"])
    table.save_to_disk(tmp_path / "saved")
    with pytest.warns(UserWarning) as caught:
        items = read(tmp_path / "saved", on_bad="skip")
    for name in (
        "3 of 4",
        "row 0 cut.jpg (the image can't be decoded)",
        "row 1 (no image)",
        "row 2 (no caption)",
    ):
        assert name in str(caught[0].message)
    assert seen(items) == [("row 3", "red", RED)]


def test_sources_that_are_not_there(tmp_path, own_cache):
    with pytest.raises(InputError, match="no file or folder"):
        read(tmp_path / "gone")
    fill(tmp_path, {"a.csv": "x", "a.parquet": "x"})
    with pytest.raises(InputError, match="no source of images"):
        read(tmp_path / "a.csv")
    with pytest.raises(InputError, match="can't be loaded as a dataset"):
        read(tmp_path / "a.parquet")


# Shards


def test_shards_with_text_and_json(tmp_path):
    shard(tmp_path / "0.tar", {"a.jpg": encoded(format="JPEG"), "a.txt": "red"})
    shard(tmp_path / "1.tar", {"b.png": encoded(BLUE), "b.json": '{"caption": "blue"}'})
    expected = [("0.tar/a", "red"), ("1.tar/b", "blue")]
    for source in (tmp_path, tmp_path / "{0..1}.tar"):
        items = read(source)
        assert len(items) == 2
        assert [(item.key, item.caption) for item in items] == expected
    assert len(read(tmp_path / "0.tar")) == 1


def test_columns_of_shards_can_be_named(tmp_path):
    files = {"a.jpg": encoded(), "a.mask.png": encoded(GREEN), "a.txt": "t", "a.json": '{"p": "g"}'}
    items = read(shard(tmp_path / "0.tar", files), image_column="mask.png", caption_column="p")
    assert seen(items) == [("0.tar/a", "g", GREEN)]


def test_bad_samples_are_named(tmp_path):
    files = {
        "cut.jpg": noisy_jpeg()[:900],
        "cut.txt": "x",
        "good.png": encoded(),
        "good.txt": "red",
        "mute.png": encoded(),
        "tagged.png": encoded(),
        "tagged.json": '{"tag": "x"}',
        "words.txt": "x",
        "zoo.png": encoded(),
        "zoo.json": "{",
    }
    with pytest.warns(UserWarning) as caught:
        items = read(shard(tmp_path / "0.tar", files), on_bad="skip")
    for name in (
        "5 of 6",
        "0.tar/cut (the image can't be decoded)",
        "0.tar/mute (no caption)",
        "0.tar/tagged (no caption under 'text' or 'caption')",
        "0.tar/words (no image)",
        "0.tar/zoo (the caption can't be read)",
    ):
        assert name in str(caught[0].message)
    assert seen(items) == [("0.tar/good", "red", RED)]


def test_a_cut_shard_is_named_and_the_others_read(tmp_path):
    whole = shard(tmp_path / "0.tar", {"a.png": encoded(), "a.txt": "red", "b.jpg": noisy_jpeg()})
    whole.write_bytes(whole.read_bytes()[:3000])
    shard(tmp_path / "1.tar", {"c.png": encoded(BLUE), "c.txt": "blue"})
    with pytest.warns(UserWarning, match=r"0\.tar \(the file is broken"):
        items = read(tmp_path, on_bad="skip")
    assert seen(items)[-1] == ("1.tar/c", "blue", BLUE)
    (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match=r"0\.tar \(the file is broken"):
        read(tmp_path)


def test_shards_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(InputError, match=r"no shard .*1\.tar"):
        shard(tmp_path / "0.tar", {})
        read(tmp_path / "{0..1}.tar")
    with pytest.raises(InputError, match="holds no images"):
        read(tmp_path / "0.tar")


@pytest.mark.parametrize("package, source", [("webdataset", "0.tar"), ("datasets", "some/name")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package, source):
    monkeypatch.chdir(tmp_path)
    shard(tmp_path / "0.tar", {"a.png": encoded(), "a.txt": "red"})
    monkeypatch.setitem(sys.modules, package, None)  # how Python itself marks a blocked import
    with pytest.raises(InputError, match=rf"needs the package '{package}'.*pared\[data\]"):
        read(source)
