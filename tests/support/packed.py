"""Runs a packed bundle as its users do, in an interpreter of its own with few packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MISSING = ("jinja2", "tqdm", "shtab", "sentencepiece", "cryptography", "torch", "transformers", "onnx", "onnx_ir")
"""Packages that a packed bundle can do without."""

# Not even satchel itself may come from outside: its finder for an editable installation is taken out.
LIGHT_PYTHON = """
import runpy, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {missing!r} else super().find_spec(name, path, target)

kept = [finder for finder in sys.meta_path if finder is not PathFinder and "editable" not in repr(finder).lower()]
sys.meta_path = [*kept, Finder]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_packed(
    packed: Path, *arguments: str, text: str | None = None, missing: Sequence[str] = MISSING
) -> subprocess.CompletedProcess[str]:
    """`python PACKED arguments` where the packages in `missing` are not installed."""
    code = LIGHT_PYTHON.format(missing=tuple(missing))
    command = [sys.executable, "-c", code, str(packed), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, input=text)
