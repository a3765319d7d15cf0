"""CONTRIBUTING's method number 62 is what it says: its own files, and nothing else to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pared
from tests.docs.markdown import ROOT, blocks

PACKAGE = Path(pared.__file__).parent
PAGE = ROOT / "CONTRIBUTING.md"


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the files that the page shows; the rest are links to this one."""
    for language in ("python", "toml", "json"):
        for block in blocks(PAGE, language):
            path = tmp_path / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    for folder, original in (
        ("src/pared", PACKAGE),
        ("src/pared/attention", PACKAGE / "attention"),
    ):
        for path in original.iterdir():
            if not (tmp_path / folder / path.name).exists():
                (tmp_path / folder / path.name).symlink_to(path)
    return tmp_path


def python(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_method_is_registered_with_its_claims(checkout):
    listed = python(checkout, "-m", "pared", "methods", "mean-mixing")
    assert "pared.MeanMixing (conversion, in attention)" in listed
    assert "number >= 0 and <= 1" in listed
    assert "holds" in listed


def test_its_files_are_whole_and_its_tests_pass(checkout):
    code = """
import sys, pytest
from pared import recipe, results
assert results.read("mean-mixing").claims[0].holds
assert recipe.read("recipes/mean-mixing/mini.toml").model.methods == ("mean-mixing",)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir=.", "tests/attention"]))
"""
    python(checkout, "-c", code)


@pytest.mark.slow
def test_it_keeps_the_contract(checkout):
    said = python(checkout, "-m", "pared", "check", "mean-mixing")
    assert said.splitlines()[-1].endswith("checks, none failed")
