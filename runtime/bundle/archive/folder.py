"""Finds files of a bundle folder by name, without following links."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

from satchel.runtime.bundle.archive.span import Span
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.names import impossible_on_windows, leads_outside, too_long


def check_name(root: Path, name: str) -> None:
    """Check that a name cannot refer to a file outside the bundle `root`, on any system. Raises BundleError."""
    if leads_outside(name) or too_long(name):
        raise BundleError(
            f"{root}/manifest.json: {name[:200]!r} leads outside the bundle, which is not allowed: "
            "put the file itself into the folder, or do not trust this bundle"
        )
    if impossible_on_windows(name):
        raise BundleError(
            f"{root}/manifest.json: {name!r} is not a file name on Windows: rename it, or do not trust this bundle"
        )


def folder_span(folder: Path, name: str) -> Span:
    """The file `name` of a bundle folder. The folder itself may be a link; nothing in it may be one.

    Raises BundleError for a name that leads outside, and for a file that is missing, a link, or not a regular file.
    """
    check_name(folder, name)
    path, mode = folder, 0
    for part in PurePosixPath(name).parts:
        path = path / part
        try:
            status = path.lstat()
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise BundleError(f"{folder / name}: missing: copy the bundle again, or export it again") from None
            raise BundleError(f"{path}: cannot be looked up ({error.strerror}): check its permissions") from None
        mode = status.st_mode
        if stat.S_ISLNK(mode):
            raise BundleError(
                f"{path}: a link, which is not allowed in a bundle: put the file itself there, "
                "or do not trust this bundle"
            )
    if not stat.S_ISREG(mode):
        raise BundleError(f"{folder / name}: not a regular file: copy the bundle again, or do not trust it")
    return Span(folder / name, 0, status.st_size, whole=True)
