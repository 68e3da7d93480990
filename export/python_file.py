"""Runs a user's Python file, which has a module factory or graph passes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def run_file(path: Path, role: str) -> ModuleType | None:
    """Run a file as `python file.py` does: it can import modules in its folder, and its classes find their module.

    `role` separates files of the same name with different purposes. Returns None if the name does not end in .py.
    Raises whatever the file's code raises.
    """
    spec = importlib.util.spec_from_file_location(f"satchel_{role}_{path.stem}", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
