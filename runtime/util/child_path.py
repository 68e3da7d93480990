"""How a child process finds the modules that this one runs, also those inside a packed bundle."""

from __future__ import annotations

import os
import sys


def python_path() -> str:
    """A value of PYTHONPATH with which a child finds the packages that this process finds.

    Not what happens to lie in the current folder: start the child with `-P`.
    """
    return os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
