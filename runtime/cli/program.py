"""What `python MODEL.pyz` does: the commands of satchel, on the bundle in that very file."""

from __future__ import annotations

import os
from collections.abc import Sequence

from satchel.runtime.util.interrupt import guarded


def main(packed: str, arguments: Sequence[str]) -> int:
    """Run `arguments`, a command line without BUNDLE, on the packed bundle. Returns the command's exit code."""
    return guarded(lambda: _run(packed, list(arguments)))


def _run(packed: str, arguments: list[str]) -> int:
    from satchel.runtime.cli import main as cli

    if arguments[:1] == ["--version"]:
        return cli.main(arguments)
    command = arguments.pop(0) if arguments and arguments[0] in cli.PACKED_COMMANDS else "run"
    return cli.main([command, packed, *arguments], packed=os.path.basename(packed))
