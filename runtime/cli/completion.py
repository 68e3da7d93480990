"""`satchel completion`: prints the script by which a shell completes the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from satchel.runtime.ort.providers import PROVIDERS

if TYPE_CHECKING:
    from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish")

FOLDERS = ("BUNDLE",)
FILES = ("CHECKPOINT", "FILE", "PATH", "SOURCE")
"""What arguments are called, as metavars, that are paths; so are those of type Path."""

EPILOG = """\
The shell must run the script. One way is a line in the file that it reads at its start:

  ~/.bashrc                   eval "$(satchel completion bash)"
  ~/.zshrc, after compinit    eval "$(satchel completion zsh)"
  ~/.config/fish/config.fish  satchel completion fish | source

Another is to save it where the shell looks for such scripts, and to do so again after an update of satchel.

example:
  satchel completion bash > satchel.bash"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `satchel completion`."""
    parser.description = (
        "Print a script that teaches a shell to complete satchel's commands, flags, choices and paths when the Tab key "
        "is pressed."
    )
    parser.epilog = EPILOG
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"the shell: {', '.join(SHELLS)}")


def main(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    from satchel.export.config import KV_CACHES, PRECISIONS, TARGETS
    from satchel.runtime.cli.main import COMMANDS, build_full_parser

    # These are checked later than argparse's own choices, with messages of their own.
    choices = {"--precision": PRECISIONS, "--kv-cache": KV_CACHES, "--target": TARGETS, "--provider": tuple(PROVIDERS)}
    parser = build_full_parser()
    for action in _actions(parser):
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                subparser.description = COMMANDS[name].help  # menus have room for that
        for flag in choices.keys() & set(action.option_strings):
            action.choices = choices[flag]
        if action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    sys.stdout.write(shtab.complete(parser, args.shell) + "\n")
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its subcommands; argparse has no public list of them."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _actions(subparser)
