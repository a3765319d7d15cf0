"""The recipes of papers start and train, in two processes, on real classes at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.recipes.pipelines import pipeline

RECIPES = Path(__file__).parents[2] / "recipes"
FAMILIES = {"edit": "pixart", "mm-edit": "sd3", "linfusion": "unet", "clear": "flux"}


@pytest.mark.slow
@pytest.mark.parametrize("method", FAMILIES)
def test_ten_steps_in_two_processes(method, tmp_path):
    pipeline(FAMILIES[method]).save_pretrained(tmp_path / "teacher")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(8):
        Image.effect_noise((80, 80), 60).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"cat face {number}")
    recipe = RECIPES / method / "paper.toml"
    stages = recipe.read_text().count("[[stages]]")
    changes = [f"model.from={tmp_path / 'teacher'}", f"data.source={photos}"]
    for stage in range(stages):
        changes += [f"stages.{stage}.size=64"]
        changes += [
            f"stages.{stage}.training.{entry}"
            for entry in ("steps=10", "batch_size=4", "accumulation=2", "warmup=2", "log_every=1")
        ]
    words = [word for change in changes for word in ("--set", change)]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "pared", "train", str(recipe), "-o", str(tmp_path / "out"), *words,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in range(stages):
        log = (tmp_path / "out" / f"stage-{stage + 1}" / "log.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in log]
        assert [step["step"] for step in steps] == list(range(1, 11))
        assert {"task", "output", "feature"} <= steps[-1].keys()
    assert (tmp_path / "out" / "model" / "pared.json").exists()
