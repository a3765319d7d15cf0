"""`pared check`: a line per check, and exit code 1 when one fails."""

import json
from pathlib import Path

import pytest

from pared import info
from pared.bench import contract
from pared.cli import check


@pytest.fixture(autouse=True)
def short_contract(monkeypatch):
    """One function of the contract; tests/test_contract.py runs them all."""

    def cases(record):
        yield "dit", contract.contract_twice

    monkeypatch.setattr(contract, "cases", cases)


def test_lines(run):
    result = run("check", "edit")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "edit"
    assert lines[-2].startswith("  ok ")
    assert lines[-2].endswith(" s  dit: Converting twice is the same as once.")
    assert lines[-1] == f"{len(lines) - 2} checks, none failed"


def test_own_checks_come_first(run):
    results = json.loads(run("check", "edit", "--json").stdout)
    names = [result["name"] for result in results]
    assert names[-1] == "contract_twice"
    assert names[:-1] and all(name.startswith("check_") for name in names[:-1])
    assert all(result["passed"] and result["text"] and result["seconds"] >= 0 for result in results)


def test_without_names_all_methods(run, monkeypatch):
    monkeypatch.setattr(check, "_run", lambda c: check.Result(c.method, "", "", "", True, 0.0, ""))
    results = json.loads(run("check", "--json").stdout)
    assert list(dict.fromkeys(r["method"] for r in results)) == list(info.registry())


def fail():
    """Two and two are five."""
    raise AssertionError("they are four\nreally")


def crash():
    """It runs."""
    raise KeyError("weight")


def test_failures(run, monkeypatch):
    checks = [check.Check("edit", "", f.__name__, check._first_line(f), f) for f in (fail, crash)]
    monkeypatch.setattr(check, "_checks", lambda record: checks)
    result = run("check", "edit")
    assert result.exit_code == 1
    lines = [line.replace("  0.00 s ", "") for line in result.stdout.splitlines()]
    assert lines == [
        "edit",
        "  FAIL  Two and two are five.",
        "       they are four",
        "       really",
        "  FAIL  It runs.",
        "       KeyError: 'weight'",
        "2 checks, 2 failed",
    ]
    assert run("check", "edit", "--json").exit_code == 1


def test_refusals(refused):
    assert "did you mean edit" in refused("check", "edti")
    assert "did you mean edit" in refused("check", "edit", "edti")


def test_every_own_check_says_what_it_shows():
    for record in info.registry().values():
        path = Path(*record.module.split("."))
        file = Path(info.__file__).parents[1] / f"{path}_checks.py"
        if not file.exists():
            continue
        for line, following in zip(
            (lines := file.read_text().splitlines()), lines[1:], strict=False
        ):
            if line.startswith("def check_"):
                assert following.startswith('    """'), f"{file.name}: {line} has no docstring"
