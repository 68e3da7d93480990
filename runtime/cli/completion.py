"""`satchel completion`: prints a shell completion script."""

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
"""Metavars of arguments that are paths; so are those of type Path."""

EPILOG = """\
The shell must run the script, for example by a line in its startup file:

  ~/.bashrc                   eval "$(satchel completion bash)"
  ~/.zshrc, after compinit    eval "$(satchel completion zsh)"
  ~/.config/fish/config.fish  satchel completion fish | source

Or save the script where the shell looks for completions, and save it again after an update of satchel.

example:
  satchel completion bash > satchel.bash"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `satchel completion`."""
    parser.description = "Print a script with which a shell completes satchel's commands, flags, choices and paths."
    parser.epilog = EPILOG
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"the shell: {', '.join(SHELLS)}")


def main(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    from satchel.export.config import EFFORTS, KV_CACHES, LATENT_CACHES, PRECISIONS, TARGETS
    from satchel.runtime.cli.main import COMMANDS, build_full_parser

    # argparse does not know these choices: they are checked later, with messages of their own.
    choices = {
        "--precision": PRECISIONS, "--effort": EFFORTS, "--kv-cache": KV_CACHES, "--target": TARGETS,
        "--provider": tuple(PROVIDERS), "--latent-cache": LATENT_CACHES,
    }  # fmt: skip
    parser = build_full_parser()
    for action in _actions(parser):
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                subparser.description = COMMANDS[name].help  # short enough for menus
        for flag in choices.keys() & set(action.option_strings):
            action.choices = choices[flag]
        if action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    sys.stdout.write(shtab.complete(parser, args.shell) + "\n")
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and its subcommands; argparse has no public list of them."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _actions(subparser)
