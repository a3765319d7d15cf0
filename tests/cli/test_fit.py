"""`pared fit`, and what takes its plan."""

import html
import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.cli import toy_pipeline


@pytest.fixture
def pipeline(tmp_path):
    return str(toy_pipeline.write(tmp_path / "pipe"))


def test_a_plan_is_found_and_used(run, tmp_path, pipeline):
    words = ["--quality", "5dB", "--steps", 6, "--pictures", 2, "--method", "re-ttention"]
    words += ["--guidance", 2, "--height", 32, "--width", 48, "--dtype", "float32"]
    result = run("fit", pipeline, *words, "-o", "plan.json")
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["complete"] and plan["budget"] == {"decibels": 5.0}
    assert (plan["model"], plan["sampler"]) == (pipeline, "DPMSolverMultistepScheduler")
    assert f"pared sample {pipeline} PROMPT --plan plan.json" in result.output
    result = run("fit", pipeline, *words, "--json", "-o", "plan.json")
    assert json.loads(result.stdout)["steps"] >= 1


def test_a_plan_runs_as_it_was_measured(run, tmp_path, pipeline):
    plan = {
        "model": pipeline,
        "sampler": "DPMSolverMultistepScheduler",
        "dtype": "float32",
        "call": {"guidance_scale": 2.0, "height": 32, "width": 48},
        "with": ["taylorseer:interval=2,warmup=1"],
        "steps": 4,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    sample = ["sample", Path(pipeline).parent / "." / Path(pipeline).name, "red apple"]

    def pixels(*words):
        result = run(*sample, *words, "-o", "a.png")
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / "a.png") as image:
            return image.size, image.tobytes()

    found = pixels("--plan", "plan.json")
    assert found[0] == (48, 32)
    words = ["--with", plan["with"][0], "--steps", 4, "--guidance", 2]
    assert found == pixels(*words, "--height", 32, "--width", 48)
    # What is said on the command line goes before the plan.
    assert pixels("--plan", "plan.json", "--height", 48)[0] == (48, 48)
    words = ["--plan", "plan.json", "--guidance", 3, "--steps", 3]
    assert pixels(*words) != found


def test_a_frontier_of_a_method_and_its_commands(run, tmp_path, pipeline):
    words = ["--frontier", "--method", "re-ttention", "--steps", 6, "--rounds", 1, "--guidance", 2]
    words += ["--height", 32, "--width", 48, "--prompt", "a b", "--html", "page.html", "--json"]
    result = run("bench", pipeline, *words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    names = [row["name"] for row in found["rows"]]
    assert {"base", "re-ttention:keep=0.125", "re-ttention:keep=0.25"} <= set(names)
    assert found["front"] and set(found["front"]) <= set(names)
    page = (tmp_path / "page.html").read_text()
    for row in found["rows"][:2]:
        command = shlex.split(row["command"])
        assert command[:4] == ["pared", "sample", pipeline, "a b"]
        assert command.count("--with") == len(row["stack"])
        assert html.escape(row["command"]) in page
        result = run(*command[1:])
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / "picture.png") as image:
            assert image.size == (48, 32)
    assert command[command.index("--guidance") + 1] == "2.0" and "--steps 6" in row["command"]
    assert "Time and closeness" in page


@pytest.mark.parametrize(
    "words, part",
    [
        (["fit", "PIPE", "-o", "x.json"], "give --latency"),
        (["fit", "PIPE", "--latency", "1s", "--quality", "3", "-o", "x"], "one of the two"),
        (["fit", "PIPE", "--latency", "soon", "-o", "x"], "'soon' is no amount in s"),
        (["fit", "PIPE", "--quality", "0", "-o", "x"], "'0' is no amount in dB"),
        (["fit", "toy:dit", "--quality", "3", "-o", "x"], "toy:dit is a configuration"),
        (["fit", "PIPE", "--quality", "3", "-o", "."], "is a folder; give the name of a file, e.g"),
        (["fit", "PIPE", "--quality", "3", "--height", "60", "-o", "x"], "--height 60 doesn't wor"),
        (["fit", "PIPE", "--quality", "3", "--method", "edit", "-o", "x"], "use `pared convert`"),
        (["sample", "PIPE", "cat", "--plan", "no.json", "-o", "x"], "there is no plan no.json"),
        (["sample", "PIPE", "cat", "--plan", "other.json", "-o", "x"], "is a plan for house:unet"),
        (["sample", "PIPE", "cat", "--plan", "euler.json", "-o", "x"], "the sampler EulerDis"),
        (["bench", "PIPE", "--method", "re-ttention", "--with", "re-ttention"], "--frontier"),
        (["bench", "toy:dit", "--frontier"], "toy:dit is a configuration"),
        (["bench", "toy:dit", "--peers"], "toy:dit is a configuration"),
    ],
)
def test_refusals(refused, tmp_path, pipeline, words, part):
    plan = {"model": "house:unet", "sampler": "X", "dtype": "float32", "call": {}, "with": []}
    (tmp_path / "other.json").write_text(json.dumps(plan | {"steps": 4}))
    plan |= {"model": pipeline, "sampler": "EulerDiscreteScheduler", "steps": 4}
    (tmp_path / "euler.json").write_text(json.dumps(plan))
    assert part in refused(*(pipeline if word == "PIPE" else word for word in words))
