"""The `satchel` command, also started by `python -m satchel`. Imports nothing before Ctrl-C is handled."""

from __future__ import annotations

import sys

from satchel.runtime.util.interrupt import guarded


def main() -> int:
    """Run the command line in `sys.argv`. Returns the exit code."""
    return guarded(_command)


def _command() -> int:
    from satchel.runtime.cli.main import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
