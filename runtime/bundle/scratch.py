"""Temporary files and folders with the process id in their names, so that those of a killed process can be removed.

A name is PREFIX and the process id, optionally followed by a hyphen and more. Processes on other machines are not
visible: two machines must not work in one shared folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_started = time.time() - 1
"""An older path with this process's id is from an earlier container, where another process had the same id."""


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """An empty folder in `parent`, removed at the end; those left by dead processes are removed first.

    Raises OSError if it cannot be created.
    """
    sweep(parent, prefix)
    path = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sweep(parent: Path, prefix: str) -> None:
    """Remove paths in `parent` with the prefix that dead processes left, as far as permissions allow."""
    for path in abandoned(parent, prefix):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def abandoned(parent: Path, prefix: str) -> list[Path]:
    """The paths in `parent` named `prefix` and the id of a dead process; none if `parent` cannot be read."""
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
    if sys.platform == "win32":  # os.kill would send Ctrl-C there
        return _alive_on_windows(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _alive_on_windows(pid: int) -> bool:
    import ctypes

    query, denied, active, largest = 0x1000, 5, 259, 0xFFFFFFFF  # of winnt.h, winerror.h and winbase.h
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined, unused-ignore]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(kernel.OpenProcess(query, False, ctypes.c_uint32(pid)) if pid <= largest else None)
    if not handle:
        return bool(ctypes.get_last_error() == denied)  # type: ignore[attr-defined, unused-ignore]
    code = ctypes.c_uint32()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == active
