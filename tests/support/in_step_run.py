"""A program for several ranks that run in step: the command itself is replaced by one that notes what it was given.

mpiexec -n N python in_step_run.py FOLDER COMMAND ...
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

from satchel.runtime.cli import run
from satchel.runtime.cli.main import main
from satchel.runtime.execution.ranks import world


def note(args: argparse.Namespace) -> int:
    """Write the flags that a rank was given into FOLDER/RANK.json, and print a line."""
    rank = Path(args.bundle).name
    found = {name: getattr(args, name) for name in ("seed", "provider_option", "quiet")}
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
    print(f"text of {rank}")
    return 0


if __name__ == "__main__":
    with mock.patch.object(world, "lacking", lambda path: None), mock.patch.object(run, "main", note):
        sys.exit(main(sys.argv[2:]))
