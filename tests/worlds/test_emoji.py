"""The emoji world: what the file holds, how it is read, its pairs and its split."""

import json
import sys
from collections import defaultdict

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.errors import InputError
from pared.worlds import emoji


@pytest.fixture(scope="module")
def world():
    return emoji.load(size=16)


def test_holds_the_whole_of_unicode(world):
    assert len(world) == 3783
    assert len(set(world.characters)) == len(set(world.captions)) == len(world)
    assert len(set(zip(world.bases, world.skin_tones, world.genders, strict=True))) == len(world)
    assert len(set(world.groups)) == 9
    assert all(caption == caption.lower().strip() != "" for caption in world.captions)


@pytest.mark.parametrize(
    "caption, base, skin_tone, gender",
    [
        ("grinning face", "grinning face", "", ""),
        ("firefighter", "firefighter", "", "person"),
        ("man firefighter: medium-dark skin tone", "firefighter", "medium-dark", "man"),
        ("man: light skin tone, beard", "beard", "light", "man"),
        ("kiss: woman, man, dark skin tone, light skin tone", "kiss", "dark, light", "woman, man"),
        ("women holding hands: light skin tone", "holding hands", "light", "women"),
        ("older person", "old", "", "person"),
        ("mermaid", "merperson", "", "woman"),
        ("girl: dark skin tone", "child", "dark", "girl"),
        ("person in bed: light skin tone", "person in bed", "light", ""),
        ("woman with headscarf", "woman with headscarf", "", "woman"),
        ("woman walking facing right: medium skin tone", "walking facing right", "medium", "woman"),
        ("hot beverage", "hot beverage", "", ""),
        ("family: man, woman, girl", "family: man, woman, girl", "", ""),
    ],
)
def test_names_are_taken_apart(world, caption, base, skin_tone, gender):
    row = world.captions.index(caption)
    assert (world.bases[row], world.skin_tones[row], world.genders[row]) == (
        base,
        skin_tone,
        gender,
    )


def test_datasets_opens_the_file_with_decoded_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "parquet", data_files=str(emoji.FILE), split="train", cache_dir=str(tmp_path)
    )
    first = rows[0]
    assert isinstance(rows.features["image"], datasets.Image)
    assert first["image"].size == (128, 128) and first["image"].mode == "RGB"
    assert first["caption"] == "grinning face"


def test_metadata_names_every_column():
    schema = pq.read_schema(emoji.FILE)
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names


def test_pictures_are_drawn_on_white(world):
    assert world.images.dtype == torch.uint8 and world.images.shape == (len(world), 3, 16, 16)
    darkest = world.images.flatten(1).amin(1)
    assert (darkest < 250).all(), "an emoji without ink"
    corners = world.images[:, :, 0, 0]
    assert (corners == 255).all(1).float().mean() > 0.9


def test_halving_averages_whole_pixels():
    full = emoji.load("heldout", size=128).images[:20].float()
    half = emoji.load("heldout", size=64).images[:20].float()
    mean = torch.nn.functional.avg_pool2d(full, 2)
    assert (half - mean).abs().max() <= 1  # rounded after each direction


@pytest.mark.parametrize("size", [1, 48, 128])
def test_any_size_up_to_the_stored(size):
    rows = emoji.load("heldout", size=size)
    assert rows.images.shape == (len(rows), 3, size, size)


def test_without_pictures():
    rows = emoji.load("train", size=None)
    assert rows.images is None and rows.select([1]).images is None and len(rows) == 3591


def test_refusals():
    with pytest.raises(InputError, match="no split 'test'; it has train and heldout"):
        emoji.load("test")
    for size in (0, 129):
        with pytest.raises(InputError, match=f"size {size}; the size must be from 1 to"):
            emoji.load(size=size)
    rows = emoji.load("heldout", size=None)
    with pytest.raises(InputError, match="can't change 'hair'"):
        emoji.pairs(rows, "hair")
    with pytest.raises(InputError, match="no split 'test'"):
        emoji.pairs(rows, split="test")


def test_missing_pyarrow_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # how Python marks a blocked import
    with pytest.raises(InputError, match=r"needs the package 'pyarrow'.*pared\[data\]"):
        emoji.load()


@settings(max_examples=20, deadline=None)
@given(indices=st.lists(st.integers(0, 3782), max_size=8))
def test_select_keeps_rows_together(world, indices):
    rows = world.select(indices)
    assert len(rows) == len(indices) and rows.captions == [world.captions[i] for i in indices]
    assert torch.equal(rows.images, world.images[indices])
    assert rows.splits == [world.splits[i] for i in indices]


@pytest.mark.parametrize("change", ["skin_tone", "gender"])
def test_pairs_differ_in_one_attribute_only(world, change):
    columns = {"skin_tone": world.skin_tones, "gender": world.genders}
    changed = columns.pop(change)
    (kept,) = columns.values()
    found = emoji.pairs(world, change)
    assert len(found) > 3000
    for pair in found:
        assert world.bases[pair.before] == world.bases[pair.after]
        assert kept[pair.before] == kept[pair.after]
        assert changed[pair.before] != changed[pair.after]
    both_ways = {(pair.before, pair.after) for pair in found}
    assert len(both_ways) == len(found)
    assert all((after, before) in both_ways for before, after in both_ways)


def test_pairs_show_different_pictures():
    full = emoji.load(size=64)
    for change in ("skin_tone", "gender"):
        found = emoji.pairs(full, change)
        before = full.images[[pair.before for pair in found]]
        after = full.images[[pair.after for pair in found]]
        assert (before != after).flatten(1).any(1).all()


@pytest.mark.parametrize(
    "change, before, after, instruction",
    [
        ("skin_tone", "cook", "cook: dark skin tone", "make the skin tone dark"),
        ("skin_tone", "cook: dark skin tone", "cook", "make the skin tone yellow"),
        (
            "skin_tone",
            "handshake",
            "handshake: light skin tone, dark skin tone",
            "make the skin tones light and dark",
        ),
        ("gender", "man cook", "woman cook", "turn the man into a woman"),
        ("gender", "cook", "man cook", "turn the person into a man"),
        ("gender", "men wrestling", "women wrestling", "turn the men into women"),
        (
            "gender",
            "kiss",
            "kiss: woman, man",
            "turn the two people into a woman and a man",
        ),
    ],
)
def test_instructions(world, change, before, after, instruction):
    ends = (world.captions.index(before), world.captions.index(after))
    found = [p for p in emoji.pairs(world, change) if (p.before, p.after) == ends]
    assert [pair.instruction for pair in found] == [instruction]


def test_pairs_of_a_split(world):
    both = emoji.pairs(world, "gender")
    train, heldout = (emoji.pairs(world, "gender", split) for split in emoji.SPLITS)
    assert len(train) + len(heldout) == len(both) and heldout
    assert all(world.splits[p.before] == world.splits[p.after] == "train" for p in train)
    assert all("heldout" in (world.splits[p.before], world.splits[p.after]) for p in heldout)


def test_whole_combinations_are_held_out(world):
    """A held-out row's combination never occurs in train; each of its parts does."""
    seen = defaultdict(set)
    for row, split in enumerate(world.splits):
        base, tone, gender = world.bases[row], world.skin_tones[row], world.genders[row]
        seen[split, "parts"] |= {("base", base), ("tone", tone), ("gender", gender)}
        seen[split, "combinations"] |= {("tone", base, tone), ("gender", base, gender)}
    assert seen["heldout", "parts"] <= seen["train", "parts"]
    for row in (r for r, split in enumerate(world.splits) if split == "heldout"):
        base, tone, gender = world.bases[row], world.skin_tones[row], world.genders[row]
        new = {("tone", base, tone), ("gender", base, gender)} - seen["train", "combinations"]
        assert new, world.captions[row]
    assert 0.05 < world.splits.count("heldout") / len(world) < 0.08
