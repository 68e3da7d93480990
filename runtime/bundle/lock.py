"""A lock for work that changes a bundle. It is released when its process ends, and leaves no file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path


class BusyError(Exception):
    """Another process has the lock."""


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock of a bundle, a folder or a packed file, while the block runs.

    If another process has it, `waiting` is called before waiting for it; without `waiting`, BusyError is raised.
    Without file locks, as on some network file systems, or if the path does not exist, nothing is locked.
    """
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (ImportError, OSError):  # on Windows; or opening the bundle reports the error
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise BusyError(str(path)) from None
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # the file system has no locks
        yield
    finally:
        os.close(handle)
