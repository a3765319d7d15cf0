"""`pared bill`: thin over `pared.bench.bill`, which has its own tests."""

import json

import pytest

from pared.bench.bill import bill


def test_table(run):
    result = run("bill", "toy:dit", "--height", 64, "--width", 64, "--batch", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout == bill("toy:dit", height=64, width=64, batch=2).table() + "\n"


def test_json(run):
    result = run("bill", "toy:dit", "--steps", 7, "--json")
    assert json.loads(result.stdout) == bill("toy:dit", steps=7).to_dict()


def test_rebuilt_with_a_method(run):
    result = run("bill", "toy:dit", "--with", "kv-compression", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["with"] == ["kv-compression"]
    assert content["rebuilt"]["total_macs"] < content["total_macs"]
    text = run("bill", "toy:dit", "--with", "kv-compression").stdout
    ratio = content["macs_per_image"] / content["rebuilt"]["macs_per_image"]
    assert f"With kv-compression, {ratio:.2f}x fewer MACs per image:" in text


def test_a_product_against_the_naive_one(run):
    words = ["bill", "toy:unet", "--passes", 3, "--tasks", 4]
    words += ["--with", "multi-task-upcycling", "--with", "explicit-conditioning"]
    content = json.loads(run(*words, "--json").stdout)
    assert content["models"] == 4
    assert content["rebuilt"]["models"] == 1
    assert content["rebuilt"]["passes"] == 1
    text = run(*words).stdout
    assert "fewer MACs per image and" in text
    assert "fewer parameters:" in text


def test_savings(run):
    content = json.loads(run("bill", "toy:dit", "--savings", "--json").stdout)
    assert "kv-compression" in [saving["slug"] for saving in content["savings"]]
    assert "kv-compression" in run("bill", "toy:dit", "--savings").stdout


def test_a_saved_pipeline(run, pipeline):
    result = run("bill", pipeline, "--json")
    assert result.exit_code == 0, result.output
    assert {line["part"] for line in json.loads(result.stdout)["lines"]} >= {"denoiser", "vae"}


@pytest.mark.parametrize(
    "words, part",
    [
        (["nope"], "there is no model 'nope'"),
        (["owner/name"], "nothing is downloaded for a bill"),
        (["toy:dit", "--height", "100"], "the nearest that works is 96 or 112"),
        (["toy:dit", "--with", "edit:r=0"], "edit: r=0 doesn't work"),
        (["toy:flux", "--with", "edit"], "edit can't be used on FluxTransformer2DModel"),
        (["house:vae"], "pared can't read a AutoencoderKL"),
    ],
)
def test_refusals(refused, words, part):
    assert part in refused("bill", *words)
