"""What `python MODEL.pyz` does: the commands of satchel, on the bundle in that very file."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

from satchel.runtime.cli import main as cli

COMMANDS = ("run", "chat", "verify", "inspect", "bench")
"""Commands that the first argument may name; without one it is `run`."""

NEEDED = ("numpy", "onnxruntime")
"""Packages without which nothing runs; those that not every bundle needs are missed when they are imported."""

USAGE = """\
{name} is a language model and the program that runs it. It needs Python, numpy, onnxruntime and tokenizers.

  python {name} [PROMPT] [flags]    continue a prompt (the flags are below)
  python {name} {commands}          [flags]; --help after one explains it
"""


def main(packed: str, arguments: Sequence[str]) -> int:
    """Run `arguments`, a command line without BUNDLE, on the packed bundle. Returns the command's exit code."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            print(f"satchel: error: {name} is not installed: pip install {name}", file=sys.stderr)
            return cli.EXIT_INPUT
    command, rest = "run", list(arguments)
    if rest and rest[0] in COMMANDS:
        command = rest.pop(0)
    elif rest and rest[0] in ("--help", "-h"):
        print(USAGE.format(name=os.path.basename(packed), commands="|".join(COMMANDS)))
    elif rest and rest[0] == "--version":
        return cli.main(["--version"])
    return cli.main([command, packed, *rest])
