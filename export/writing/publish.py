"""Atomic creation of bundles: a folder is written next to its destination, and renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from satchel.export.errors import ExportError
from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.scratch import abandoned, sweep
from satchel.runtime.util import interrupt


def check_target(output: Path, force: bool, named: str = MANIFEST_NAME) -> None:
    """Check that a bundle may be written to `output`; `named` is the file by which one to replace is known.

    Raises:
        ExportError: `output` exists without `force`, or is not a bundle, or its parent is not a folder.
    """
    parent = output.absolute().parent
    if parent.exists() and not parent.is_dir():
        raise ExportError(f"{parent} is not a folder: choose another place for the bundle")
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / named).is_file()):
        raise ExportError(f"{output} exists and is not a bundle: choose another place (--force only replaces bundles)")
    if not force:
        raise ExportError(f"{output} already exists: choose another place, or replace it with --force")


@contextlib.contextmanager
def staged(output: Path, force: bool, named: str = MANIFEST_NAME) -> Iterator[Path]:
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
        check_target(output, force, named)
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
def scratch_folder(
    output: Path, left: Path | None = None, keeps: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """Yield a folder on the disk of `output` for temporary files; it is removed at the end.

    It is empty, or `left`, one of `left_behind`. After an interrupt it stays if `keeps` says so.
    """
    output = output.resolve()
    place = next(parent for parent in output.parents if parent.is_dir())
    folder = place / f"{_prefix(output, 'scratch')}{os.getpid()}-{time.monotonic_ns()}"
    if left is None:
        _remove_abandoned(place / output.name)
        folder.mkdir()
    else:
        left.rename(folder)
        os.utime(folder)  # older than this process, it would count as left by another with its id
        _remove_abandoned(place / output.name)
    try:
        yield folder
    except BaseException as error:
        if not ((isinstance(error, KeyboardInterrupt) or interrupt.came()) and keeps(folder)):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def left_behind(output: Path) -> list[Path]:
    """The scratch folders of exports to `output` that are over."""
    output = output.resolve()
    places = [parent for parent in output.parents if parent.is_dir()][:2]  # the parent may have been made meanwhile
    return [path for place in places for path in abandoned(place, _prefix(output, "scratch"))]


def _prefix(output: Path, kind: str) -> str:
    return f".{output.name}.{kind}-"


def _remove_abandoned(output: Path) -> None:
    """Remove files of killed exports, and restore a bundle that one had moved aside without replacing it."""
    for kind in ("partial", "scratch", "old"):
        prefix = _prefix(output, kind)
        if kind == "old" and not output.exists():
            for path in abandoned(output.parent, prefix)[:1]:
                path.rename(output)
        sweep(output.parent, prefix)
