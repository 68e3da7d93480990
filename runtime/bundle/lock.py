"""A lock for work that changes a bundle or a file. It is released when its process ends, and leaves no file."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_RETRY_AFTER = 0.2  # seconds


class BusyError(Exception):
    """Another process has the lock."""


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock of a bundle, a folder or a packed file, while the block runs.

    If another process has it, `waiting` is called before waiting for it; without `waiting`, BusyError is raised.
    Without file locks, as on some network file systems, or if the path does not exist, nothing is locked.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(held(path, waiting))
        yield


@contextlib.contextmanager
def held(path: Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """As `locked`, but OSError is raised where nothing can be locked.

    On Windows a folder cannot be locked, nor can a locked file be replaced: an empty file in the folder for temporary
    files stands for the path there.
    """
    place, flags = (path, os.O_RDONLY) if fcntl is not None else (_substitute(path), os.O_RDWR | os.O_CREAT)
    handle = os.open(place, flags)
    try:
        if not _take(handle):
            if waiting is None:
                raise BusyError(str(path))
            waiting()
            while not _take(handle, wait=True):
                time.sleep(_RETRY_AFTER)
        yield
    finally:
        os.close(handle)
        if place != path:
            with contextlib.suppress(OSError):  # Windows keeps a file that another process has opened
                place.unlink()


def _take(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file. Returns whether that worked; False in spite of `wait` where waiting is not possible."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    elif sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
    return True


def _substitute(path: Path) -> Path:
    import hashlib

    name = os.path.normcase(path.resolve())
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"satchel-{digest}.lock")
