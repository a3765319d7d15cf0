"""The command line: `pared`. One file per command, imported only when that command runs.

So `pared --help` and shell completion stay instant; the lines that they show stand here.
"""

import difflib
import errno
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from pared import __version__
from pared.errors import InputError

# In the order of use. A command is there when its file is.
COMMANDS = {
    "doctor": "Show what this machine offers: libraries, devices, disk.",
    "methods": "List all methods, or explain one.",
    "check": "Run the quick checks of methods on toy models.",
    "bill": "Show where a model's cost goes.",
    "convert": "Rebuild a model with published methods.",
    "heal": "Train a converted model against the one it came from.",
    "layers": "Find the layers that a model misses least.",
    "train": "Train what a recipe describes.",
    "route": "Learn which layers of which sampling steps need computing.",
    "sample": "Paint pictures from prompts.",
    "edit": "Change a picture by an instruction.",
    "upscale": "Make a picture four times as wide and high, and sharp.",
    "inpaint": "Take something out of a picture.",
    "enrol": "Tell an enhancer whose voice to keep.",
    "enhance": "Keep the enrolled voice of a recording.",
    "transcribe": "Write down what recordings say.",
    "bench": "Measure gain and loss side by side.",
    "search": "Find the steps at which reuse harms least.",
    "fit": "Find the best way to run a model under a budget.",
    "export": "Write a model for other runtimes and devices.",
    "demo": "See it all on the house models, offline.",
}

EPILOG = """\b
Start here:
  pared doctor
  pared methods edit
  pared bill house:pixart

\b
Shell completion:
  bash   echo 'eval "$(_PARED_COMPLETE=bash_source pared)"' >> ~/.bashrc
  zsh    echo 'eval "$(_PARED_COMPLETE=zsh_source pared)"' >> ~/.zshrc
  fish   echo '_PARED_COMPLETE=fish_source pared | source' >> ~/.config/fish/config.fish
"""


class Commands(click.Group):
    """A group whose commands are files of this folder, found without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        here = Path(__file__).parent
        return [name for name in COMMANDS if (here / f"{name}.py").exists()]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], known, n=2, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
            )
            raise InputError(f"there is no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name]) for name in names]
        # Past the group's own: it would import every command for its help line.
        return items + click.Command.shell_complete(self, ctx, incomplete)

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run, and end the process: 0 done, 1 a check failed, 2 refused, 130 interrupted."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            code = run(*args, standalone_mode=False, **extra)
        except InputError as error:
            _end(str(error), 2)
        except click.UsageError as error:
            _end(_sentence(error), 2)
        except click.Abort:
            _end("interrupted.", 130)
        except OSError as error:
            # The reader of a pipe has gone (`pared methods | head`): nobody is left to tell.
            if error.errno != errno.EPIPE:
                raise
            sys.stdout = None
            code = 1
        sys.exit(code if isinstance(code, int) else 0)


def _end(sentence: str, code: int) -> None:
    click.echo(f"pared: {sentence}", err=True)
    sys.exit(code)


def _sentence(error: click.UsageError) -> str:
    """Click's message as one sentence that says where the help is."""
    where = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        near = " or ".join(sorted(error.possibilities))
        return f"there is no option {error.option_name}; did you mean {near}{where}?"
    text = error.format_message()
    return f"{text[0].lower()}{text[1:].rstrip('.')}{where}."


@click.group(
    cls=Commands,
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="pared %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Make generative models cheap to run.

    See where a model's cost goes, lower it with published methods that combine, heal what they
    broke, and compare the result with the original side by side.

    \b
    A MODEL is one of
      house:pixart            a small model that comes with pared
      path/to/folder          a saved model or pipeline, of diffusers or of pared
      owner/name              a pipeline on the Hugging Face hub
      sd3.5-medium, toy:dit   a configuration with random weights, for cost and for trying out

    A method is written as name:setting=value,setting=value; `pared methods NAME` shows its
    settings.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
