"""`pared methods`: what it lists, and the state of claims."""

import json

import pytest

from pared import info, results


def result_file(folder, *measured):
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "edit.json").write_text(json.dumps({"claims": list(measured)}))


def measured(key="speedup-1024", holds=True, **more):
    return {"key": key, "text": key, "paper": 1.4, "ours": 1.52, "holds": holds} | more


def test_json_lists_every_method(run):
    listed = json.loads(run("methods", "--json").stdout)
    assert [method["slug"] for method in listed] == list(info.registry())
    edit = next(method for method in listed if method["slug"] == "edit")
    assert edit["class"] == "EDiT"
    assert edit["kind"] == "conversion"
    assert edit["arxiv"] == "2503.16726"
    assert edit["folder"] == "attention"
    assert set(edit["families"]) == {"pixart", "dit", "sd3", "unet"}
    assert edit["state"] in ("holds", "differs", "not measured")
    assert set(edit["claims"]) >= {"speedup-1024", "speedup-2048"}


def test_table_names_every_method(run):
    lines = run("methods").stdout.splitlines()
    assert lines[0].split() == [
        "method", "class", "kind", "arXiv", "folder", "families", "maturity", "claims",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:]] == list(info.registry())


def test_choosing(run):
    assert [m["slug"] for m in json.loads(run("methods", "--json", "--family", "dit").stdout)]
    assert json.loads(run("methods", "--json", "--kind", "objective").stdout) == [
        m for m in json.loads(run("methods", "--json").stdout) if m["kind"] == "objective"
    ]


def test_settings_with_ranges_and_defaults(run):
    result = run("methods", "edit")
    assert result.exit_code == 0
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "integer >= 1" in rows["r"] and " 4 " in rows["r"] and "width / r" in rows["r"]
    assert "sc | cf | none" in rows["key"]
    assert "list of integer or null" in rows["layers"]
    assert "number >= 0" in rows["negative_slope"]
    assert "one call of PixArt-Sigma at 1024x1024" in result.stdout


def test_settings_of_an_objective_are_its_arguments(run):
    settings = json.loads(run("methods", "summarymixing-ssl", "--json").stdout)["settings"]
    assert list(settings) == ["probability", "span", "hottest", "coolest", "cooling"]
    assert (settings["probability"]["default"], settings["span"]["default"]) == (0.65, 10)
    assert (
        settings["span"] | {"type": "integer", "description": "frames of a masked span."}
        == (settings["span"])
    )
    assert settings["probability"]["description"].endswith("cover if they didn't overlap.")


@pytest.mark.parametrize(
    "slug, by",
    [
        ("edit", "the model has to be trained after it (pared heal)"),
        ("rope-asr", "the model has to be trained after it (by a recipe, pared train)"),
        ("multi-task-upcycling", "the model has to be trained after it (by a recipe, pared train)"),
        ("harmonica", "the model stays as it is, and a small table is learnt (pared route)"),
        ("deepcache", "the model needs no training"),
    ],
)
def test_what_trains_it(run, slug, by):
    assert f"effect    outputs change; {by}\n" in run("methods", slug).stdout


def test_details_as_json(run):
    method = json.loads(run("methods", "edit", "--json").stdout)
    assert method["settings"]["r"]["default"] == 4
    assert {claim["key"] for claim in method["outcomes"]} == set(method["claims"])


@pytest.mark.parametrize(
    "found, state",
    [
        ([], "not measured"),
        ([measured()], "not measured"),  # the other claims are still open
        ([measured(holds=False)], "differs"),
        ([measured(h.key) for h in info.get("edit").headlines], "holds"),
        ([measured(holds=None)], "not measured"),
    ],
)
def test_state_of_claims(run, tmp_path, monkeypatch, found, state):
    monkeypatch.setattr(results, "PACKAGED", tmp_path / "nowhere")
    result_file(tmp_path, *found)
    (edit,) = (m for m in json.loads(run("methods", "--json").stdout) if m["slug"] == "edit")
    assert edit["state"] == state


def test_a_claim_in_numbers(run, tmp_path):
    result_file(tmp_path, measured(spread=0.031))
    line = next(x for x in run("methods", "edit").stdout.splitlines() if "at 1024x1024" in x)
    assert line.split()[:5] == ["holds", "1.4", "1.52", "±", "0.031"]


def test_the_working_directory_goes_before_the_package(run, tmp_path, monkeypatch):
    packaged = tmp_path / "package"
    packaged.mkdir()
    result_file(packaged, measured(holds=False))
    monkeypatch.setattr(results, "PACKAGED", packaged / "results")
    run("methods")  # moves into the working directory
    assert results.outcomes(info.get("edit"))[0].state == "differs"
    result_file(tmp_path, measured())
    assert results.outcomes(info.get("edit"))[0].state == "holds"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"claims": [1]}', '{"claims": [{"text": "x"}]}', "{}"]
)
def test_a_foreign_file_of_that_name_is_left_aside(run, tmp_path, monkeypatch, text):
    monkeypatch.setattr(results, "PACKAGED", tmp_path / "nowhere")
    result_file(tmp_path)
    (tmp_path / "results" / "edit.json").write_text(text)
    result = run("methods", "--json")
    assert result.exit_code == 0
    assert {m["state"] for m in json.loads(result.stdout) if m["slug"] == "edit"} == {
        "not measured"
    }


@pytest.mark.parametrize(
    "words, part",
    [
        (["edti"], "there is no method 'edti'; did you mean edit"),
        (["zzz"], "there is no method 'zzz'; known are "),
        (["--family", "flx"], "no method serves a family 'flx'; the families are "),
        (["--kind", "caching"], "'caching' is not one of 'conversion', 'runtime', 'objective'"),
        (["edit", "--kind", "runtime"], "--kind and --family choose from the list"),
    ],
)
def test_refusals(refused, words, part):
    assert part in refused("methods", *words)
