"""Files appear whole or not at all: a folder is made beside its place and moved there when it is done."""

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
        ExportError: Something is there and `force` is off, or what is there is no bundle, or its parent is no folder.
    """
    parent = output.absolute().parent
    if parent.exists() and not parent.is_dir():
        raise ExportError(f"{parent} is not a folder: choose another place for the bundle")
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST_NAME).is_file()):
        raise ExportError(
            f"{output} is there and is not a bundle: choose another place (--force replaces bundles only)"
        )
    if not force:
        raise ExportError(f"{output} already exists: choose another place, or replace it with --force")


@contextlib.contextmanager
def staged(output: Path, force: bool) -> Iterator[Path]:
    """Yield an empty folder beside `output` that takes its place when the block ends well, and is removed otherwise.

    Where `output` is a link, what it leads to is replaced.

    Raises:
        ExportError: Something has come to be at `output` meanwhile, and `force` is off.
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
    """Yield an empty folder on the disk of `output` for what an export puts aside; it is removed at the end."""
    output = output.resolve()
    place = next(parent for parent in output.parents if parent.is_dir())
    _remove_abandoned(place / output.name)
    with scratch_folder(place, f".{output.name}.scratch-") as folder:
        yield folder


def _remove_abandoned(output: Path) -> None:
    """Remove what an export that was killed left here. A bundle that it had moved away and not replaced comes back."""
    for kind in ("partial", "scratch", "old"):
        prefix = f".{output.name}.{kind}-"
        if kind == "old" and not output.exists():
            for path in abandoned(output.parent, prefix)[:1]:
                path.rename(output)
        sweep(output.parent, prefix)
