"""Lets a child process find the modules of this one, also those inside a packed bundle."""

from __future__ import annotations

import os
import sys


def python_path() -> str:
    """A value of PYTHONPATH with which a child finds the packages that this process finds.

    The current folder is left out: start the child with `-P`.
    """
    return os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
