"""A bundle as one file: which files it has, and where they lie in it."""

from __future__ import annotations

from pathlib import Path

from satchel.runtime.bundle.archive.span import Span
from satchel.runtime.bundle.archive.zip_reader import read_directory
from satchel.runtime.bundle.errors import BundleError

FOLDER = "bundle/"
"""The folder of a packed bundle in which the bundle's own files are."""

PROGRAM = ("__main__.py", "satchel/", "satchel-")
"""How the names of all other entries begin: the runner, and its version."""


def packed_files(path: Path) -> dict[str, Span]:
    """The bundle's files, by the names that they have in its folder. Raises BundleError, as `read_directory` does."""
    files = {}
    for name, span in read_directory(path.resolve()).items():
        if name.startswith(FOLDER):
            files[name.removeprefix(FOLDER)] = span
        elif not name.startswith(PROGRAM):
            raise BundleError(f"{path}: not a packed bundle ('{name}' is not one of its parts): do not trust it")
    return files
