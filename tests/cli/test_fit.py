"""`pared fit`, and what takes its plan."""

import json

import pytest

from tests.cli import toy_pipeline


@pytest.fixture
def pipeline(tmp_path):
    return str(toy_pipeline.write(tmp_path / "pipe"))


def test_a_plan_is_found_and_used(run, tmp_path, pipeline):
    words = ["--quality", "5dB", "--steps", 6, "--pictures", 2, "--method", "re-ttention"]
    result = run("fit", pipeline, *words, "-o", "plan.json")
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["complete"] and plan["budget"] == {"decibels": 5.0}
    assert f"pared sample {pipeline} PROMPT --plan plan.json" in result.output
    result = run("sample", pipeline, "red apple", "--plan", "plan.json", "-o", "a.png")
    assert result.exit_code == 0, result.output
    result = run("fit", pipeline, *words, "--json", "-o", "plan.json")
    assert json.loads(result.stdout)["steps"] >= 1


def test_a_frontier_of_a_method(run, tmp_path, pipeline):
    words = ["--frontier", "--method", "re-ttention", "--steps", 6, "--rounds", 1]
    result = run("bench", pipeline, *words, "--prompt", "a", "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert "re-ttention:keep=0.25" in result.output
    assert "pared sample" in result.output.partition("Nothing here is both faster")[2]
    assert "Time and closeness" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "words, part",
    [
        (["fit", "PIPE", "-o", "x.json"], "give --latency"),
        (["fit", "PIPE", "--latency", "1s", "--quality", "3", "-o", "x"], "one of the two"),
        (["fit", "PIPE", "--latency", "soon", "-o", "x"], "'soon' is no amount in s"),
        (["fit", "PIPE", "--quality", "0", "-o", "x"], "'0' is no amount in dB"),
        (["fit", "toy:dit", "--quality", "3", "-o", "x"], "toy:dit is a configuration"),
        (["fit", "PIPE", "--quality", "3", "--method", "edit", "-o", "x"], "use `pared convert`"),
        (["sample", "PIPE", "cat", "--plan", "no.json", "-o", "x"], "there is no plan no.json"),
        (["bench", "PIPE", "--method", "re-ttention", "--with", "re-ttention"], "--frontier"),
        (["bench", "toy:dit", "--frontier"], "toy:dit is a configuration"),
    ],
)
def test_refusals(refused, pipeline, words, part):
    assert part in refused(*(pipeline if word == "PIPE" else word for word in words))
