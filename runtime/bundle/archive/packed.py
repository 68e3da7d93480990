"""A bundle as one file: its files and their spans."""

from __future__ import annotations

from pathlib import Path

from satchel.runtime.bundle.archive.span import Span
from satchel.runtime.bundle.archive.zip_reader import read_directory
from satchel.runtime.bundle.errors import BundleError

FOLDER = "bundle/"
"""The folder in a packed bundle that has the bundle's files."""

PROGRAM = ("__main__.py", "satchel/", "satchel-")
"""Name prefixes of all other entries: the runner and its metadata."""


def packed_files(path: Path) -> dict[str, Span]:
    """The spans of a bundle's files by name. Raises BundleError, as `read_directory` does."""
    files = {}
    for name, span in read_directory(path.resolve()).items():
        if name.startswith(FOLDER):
            files[name.removeprefix(FOLDER)] = span
        elif not name.startswith(PROGRAM):
            raise BundleError(f"{path}: not a packed bundle ('{name}' is not one of its parts): do not trust it")
    return files
