"""The group: instant, helpful, and one sentence for every slip."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from pared import __version__
from pared.cli import COMMANDS, main

HELP = Path(__file__).with_name("help.txt")
NAMES = main.list_commands(click.Context(main))


def help_texts() -> str:
    """What `--help` says, of the group and of every command."""
    from click.testing import CliRunner

    pages = []
    for words in [[], *([name] for name in NAMES)]:
        result = CliRunner().invoke(
            main, [*words, "--help"], prog_name="pared", terminal_width=100, color=False
        )
        assert result.exit_code == 0
        pages.append(f"$ pared {' '.join([*words, '--help'])}\n{result.stdout}")
    return "\n".join(pages)


def test_help_is_as_committed():
    """Drift shows in review; `UPDATE_HELP=1 pytest tests/cli/test_group.py` writes it anew."""
    if os.environ.get("UPDATE_HELP"):
        HELP.write_text(help_texts())
    assert help_texts() == HELP.read_text(), "the help changed; see this test's docstring"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_teaches(name):
    command = main.get_command(click.Context(main), name)
    assert command.get_short_help_str(limit=200) == COMMANDS[name]
    assert f"  pared {name}" in command.help.partition("Example")[2]
    assert all(p.help for p in command.params if isinstance(p, click.Option))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["methods"], ["methods", "--json"], ["bill", "--help"]]
)
def test_lists_and_help_import_nothing_heavy(words):
    heavy = {"torch", "diffusers", "transformers", "pydantic", "numpy", "PIL", "huggingface_hub"}
    code = (
        "import sys\n"
        "from pared.cli import main\n"
        f"try: main({words!r})\n"
        f"finally: print('HEAVY', sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = python("-c", code)
    assert "HEAVY []" in done.stderr, done.stderr
    assert done.stdout


def test_python_m_pared():
    done = python("-m", "pared", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pared {__version__}\n", "")


def test_a_refusal_has_no_traceback():
    done = python("-m", "pared", "bill", "toy:pixrt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "pared: there is no model 'toy:pixrt'; did you mean toy:pixart or toy:dit?\n"
    )


def test_a_closed_pipe_is_quiet():
    code = "import sys, time; time.sleep(1)\nfrom pared.cli import main\nmain(['methods'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == b""


def test_alone_it_shows_the_help(run):
    result = run()
    assert result.exit_code == 0
    assert "Start here" in result.stdout


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["bil"], "there is no command 'bil'; did you mean bill?"),
        (["zzz"], f"there is no command 'zzz'; there are {', '.join(NAMES)}."),
        (
            ["bill", "toy:dit", "--hight", "8"],
            "there is no option --hight; did you mean --height or --with "
            "(see `pared bill --help`)?",
        ),
        (["bill"], "missing argument 'MODEL' (see `pared bill --help`)."),
        (
            ["bill", "toy:dit", "--steps", "0"],
            "invalid value for '--steps': 0 is not in the range x>=1 (see `pared bill --help`).",
        ),
        (["--colour"], "no such option '--colour' (see `pared --help`)."),
        (
            ["doctor", "me"],
            "got unexpected extra argument (me) (see `pared doctor --help`).",
        ),
    ],
)
def test_slips(refused, words, sentence):
    assert refused(*words) == sentence


def complete(*words: str) -> list[str]:
    shell = ShellComplete(main, {}, "pared", "_PARED_COMPLETE")
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["con"], ["convert"]),
        (["--ver"], ["--version"]),
        (["methods", "edi"], ["edit"]),
        (["convert", "toy:dit", "--with", "lin"], ["linfusion"]),
        (["sample", "house:clip", "red apple", "--with", "edi"], []),  # no run-time method
        (["bill", "toy:p"], ["toy:pixart", "toy:p"]),  # and folders, found by the shell
        (["convert", "toy:dit", "--dtype", "bf"], ["bfloat16"]),
    ],
)
def test_completion(words, wanted):
    found = complete(*words)
    assert found[:1] == wanted[:1]
    if not wanted:
        assert found == []
