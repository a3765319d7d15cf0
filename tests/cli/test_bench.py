"""`pared bench`: arms from the command line, with what it says of each."""

import json

import pytest


def test_caches_of_other_libraries_stand_beside_or_are_noted(run, pipeline):
    words = ["--with", "taylorseer:interval=2,warmup=1", "--peers", "--steps", 4, "--rounds", 1]
    result = run("bench", pipeline, *words, "--prompt", "a", "--speed-only", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    commands = {row["name"]: row["command"] for row in found["rows"]}
    assert commands["base"] == f"pared sample {pipeline} a --steps 4 -o picture.png"
    assert "--with taylorseer:interval=2,warmup=1" in commands["taylorseer:interval=2,warmup=1"]
    # Its pipeline announces no context, which First Block Cache asks for.
    assert any(note.startswith("diffusers-fbc fails: ValueError") for note in found["notes"])
    # Nothing was painted, so nothing is near.
    assert found["front"] == []


def test_arms_run_in_the_type_that_is_asked_for_and_their_commands_say_so(run, pipeline):
    words = ["--with", "taylorseer", "--against", pipeline, "--steps", 2, "--rounds", 1]
    words += ["--prompt", "a", "--speed-only", "--json", "--dtype", "bfloat16"]
    result = run("bench", pipeline, *words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["conditions"]["dtype"] == "bfloat16"
    rows = {row["name"]: row for row in found["rows"]}
    sample = f"pared sample {pipeline} a --steps 2 -o picture.png --dtype bfloat16"
    assert rows["base"]["command"] == rows[str(pipeline)]["command"] == sample
    sizes = {rows[name]["figures"]["weight_bytes"]["value"] for name in ("base", str(pipeline))}
    assert sizes == {2 * rows["base"]["figures"]["parameters"]["value"]}


@pytest.mark.parametrize(
    "words, part",
    [
        (["PIPE"], "there is nothing to compare; give an arm by --with METHOD"),
        (["PIPE", "--with", "tailorseer"], "did you mean taylorseer"),
        (["PIPE", "--peers", "--device", "tpu"], "there is no device 'tpu' here"),
        (
            ["PIPE", "--peers", "--html", "."],
            "is a folder; give the name of a file, e.g. page.html",
        ),
        (["PIPE", "--peers", "-o", "."], "is a folder; give the name of a file, e.g. figures.json"),
        (["PIPE", "--peers", "--width", "60"], "--width 60 doesn't work"),
        (["toy:dit", "--with", "sana", "--dtype", "float16"], "leave --dtype out"),
        (["toy:dit", "--peers"], "a cache of another library needs a whole pipeline"),
    ],
)
def test_refusals(refused, pipeline, words, part):
    assert part in refused("bench", *(pipeline if word == "PIPE" else word for word in words))
