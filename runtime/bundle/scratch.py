"""Temporary files and folders named after their process, so that what a killed process left is recognized and removed.

A name is PREFIX, the process id and, where there is more, a hyphen. Processes of other machines are not seen: do not
let two of them work in one shared folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_started = time.time() - 1
"""What is older and has this process's id is from an earlier container, in which another process had the same id."""


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """An empty folder in `parent`, removed at the end; those that dead processes left there are removed first.

    Raises OSError where it cannot be made.
    """
    sweep(parent, prefix)
    path = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sweep(parent: Path, prefix: str) -> None:
    """Remove what dead processes left in `parent` under names that begin with `prefix`, as far as that is allowed."""
    for path in abandoned(parent, prefix):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def abandoned(parent: Path, prefix: str) -> list[Path]:
    """The paths in `parent` whose name is `prefix` and the id of a process that is gone; none if it is unreadable."""
    try:
        names = os.listdir(parent)
    except OSError:
        return []
    found = []
    for name in names:
        pid = name.removeprefix(prefix).partition("-")[0]
        path = parent / name
        if name.startswith(prefix) and pid.isascii() and pid.isdigit() and _is_dead(int(pid), path):
            found.append(path)
    return found


def _is_dead(pid: int, path: Path) -> bool:
    if pid != os.getpid():
        return not _alive(pid)
    try:
        return path.lstat().st_mtime < _started
    except OSError:
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
