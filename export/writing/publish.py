"""Atomic creation of bundles: a folder is written next to its destination, and renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from satchel.export.errors import ExportError
from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.scratch import abandoned, scratch_folder, sweep


def check_target(output: Path, force: bool) -> None:
    """Check that a bundle may be written to `output`.

    Raises:
        ExportError: `output` exists without `force`, or is not a bundle, or its parent is not a folder.
    """
    parent = output.absolute().parent
    if parent.exists() and not parent.is_dir():
        raise ExportError(f"{parent} is not a folder: choose another place for the bundle")
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST_NAME).is_file()):
        raise ExportError(f"{output} exists and is not a bundle: choose another place (--force only replaces bundles)")
    if not force:
        raise ExportError(f"{output} already exists: choose another place, or replace it with --force")


@contextlib.contextmanager
def staged(output: Path, force: bool) -> Iterator[Path]:
    """Yield an empty folder that replaces `output` when the block succeeds, and is removed otherwise.

    If `output` is a symbolic link, its target is replaced.

    Raises:
        ExportError: `output` was created in the meantime, and `force` is off.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    stage = output.parent / f".{output.name}.partial-{os.getpid()}"
    stage.mkdir()
    try:
        yield stage
        old = output.parent / f".{output.name}.old-{os.getpid()}"
        check_target(output, force)
        if output.exists():
            output.rename(old)
        try:
            stage.rename(output)
        except BaseException:
            if old.exists():
                old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """Yield an empty folder on the disk of `output` for temporary files; it is removed at the end."""
    output = output.resolve()
    place = next(parent for parent in output.parents if parent.is_dir())
    _remove_abandoned(place / output.name)
    with scratch_folder(place, f".{output.name}.scratch-") as folder:
        yield folder


def _remove_abandoned(output: Path) -> None:
    """Remove files of killed exports, and restore a bundle that one had moved aside without replacing it."""
    for kind in ("partial", "scratch", "old"):
        prefix = f".{output.name}.{kind}-"
        if kind == "old" and not output.exists():
            for path in abandoned(output.parent, prefix)[:1]:
                path.rename(output)
        sweep(output.parent, prefix)
