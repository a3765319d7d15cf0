"""The demonstration, on the real house models, with as little of everything as will do."""

import json
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from pared.bench import demo, floor, session
from pared.cli import main
from pared.worlds import emoji

PROMPTS = demo.PROMPTS[:2]


@pytest.fixture
def little(monkeypatch):
    """Two prompts, two steps, pictures of noise to heal with, and rates that nobody measures."""
    captions = emoji.load(size=None)
    known = captions.select(captions.captions.index(prompt) for prompt in demo.PROMPTS)

    def load(split=None, size=64):
        seeded = torch.Generator().manual_seed(0)
        shape = (len(known), 3, size or 1, size or 1)
        images = torch.randint(256, shape, generator=seeded, dtype=torch.uint8)
        return emoji.Emoji(**vars(known) | {"images": images})

    rates = floor.Floor("cpu", 1, {"float32": 2e9, "bfloat16": 4e9}, 1e9)
    monkeypatch.setattr(floor, "_measure", lambda device, threads: rates)
    monkeypatch.setattr(session, "peak_memory", lambda call, device: call() or 1000)
    monkeypatch.setattr(emoji, "load", load)
    monkeypatch.setattr(demo, "PROMPTS", PROMPTS)
    monkeypatch.setattr(demo, "LIVE_PICTURES", 8)
    monkeypatch.setattr(demo, "SIZES", (64, 128))
    monkeypatch.setattr(demo, "Settings", partial(demo.Settings, steps=2))


def shown(folder, *words):
    result = CliRunner().invoke(main, ["demo", "-o", str(folder), *words], prog_name="pared")
    assert result.exit_code == 0, result.output
    return result, (folder / "report.html").read_text()


@pytest.mark.slow  # most of it is painting: prompts of 300 tokens, in every round of the bench
def test_all_of_it_on_one_page(little, tmp_path):
    result, page = shown(tmp_path / "out", "--heal-steps", "3")
    assert f"Open {tmp_path / 'out' / 'report.html'} in a browser" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["title"] == "house:pixart and its EDiT student"
    teacher, student = report["rows"]
    assert (teacher["name"], student["name"]) == ("teacher", "edit")
    assert [spec.partition(":")[0] for spec in student["stack"]] == ["edit"]
    assert "edit" in result.stdout and "teacher" in result.stdout
    # Both paint the same prompts from the same noise, and the student was trained to.
    assert 10 < student["figures"]["psnr"]["value"] < 100
    assert {"top1", "seconds", "macs_per_image"} <= student["figures"].keys()
    assert "Healing, live" in page and "trained here and now for 3 steps of 8 pictures" in page
    assert "Measured here on one full-size block of pixart-sigma" in page
    assert all(prompt in page for prompt in PROMPTS)
    told = result.stderr.splitlines()
    assert [line for line in told if line.startswith("  ")] == ["  64 x 64", "  128 x 128"]


@pytest.mark.slow
def test_the_longest_parts_can_be_left_out(little, tmp_path):
    result, page = shown(tmp_path / "out", "--quick", "--heal-steps", "0")
    assert "Healing, live" not in page and "full-size block" not in page
    assert "Healing" not in result.stderr and "full-size" not in result.stderr
    assert all(prompt in page for prompt in PROMPTS)


def test_a_place_that_is_none_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    words = ["demo", "-o", str(tmp_path / "file" / "out")]
    result = CliRunner().invoke(main, words, prog_name="pared")
    assert result.exit_code == 2 and "is a file; choose another place" in result.stderr
