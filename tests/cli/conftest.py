"""Running commands in an empty folder, and what a refusal looks like."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pared.cli import main
from tests.cli import toy_pipeline

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in a fresh folder, which is the current one."""
    monkeypatch.chdir(tmp_path)

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words], prog_name="pared")

    return invoke


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused; returns the sentence that it said."""

    def invoke(*words: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = run(*words)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert re.fullmatch(r"pared: [^\n]+[.?]\n", result.stderr), result.stderr
        assert not re.search(r"[.?!] [A-Z]", result.stderr), "more than one sentence"
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return result.stderr.removeprefix("pared: ").rstrip("\n")

    return invoke


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy text-to-image pipeline."""
    return toy_pipeline.write(tmp_path_factory.mktemp("models") / "pipeline")
