"""The memory of this process, as Linux reports it. Standard library only."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from satchel.runtime.errors import SatchelError

KIB_PER_MIB = 1024
BYTES_PER_MIB = 1 << 20
M_ARENA_MAX = -8  # of malloc.h


def peak_rss_mib() -> float:
    """The largest resident set size that the process has had, in MiB. Raises SatchelError off Linux."""
    return _field("/proc/self/status", "VmHWM:")


def pss_mib() -> float:
    """The proportional set size now, in MiB: a file page that several mappings share counts once.

    Raises SatchelError off Linux.
    """
    return _field("/proc/self/smaps_rollup", "Pss:")


def system_memory() -> tuple[int, int]:
    """The machine's memory in bytes, total and available without swapping. Raises SatchelError off Linux."""
    total, available = (round(_field("/proc/meminfo", name) * BYTES_PER_MIB) for name in ("MemTotal:", "MemAvailable:"))
    return total, available


def release_freed() -> None:
    """Return freed memory to the system: loading packs weights, and glibc keeps the memory that took.

    Does nothing with another C library.
    """
    _glibc("malloc_trim", 0)


def use_one_arena() -> None:
    """Make all threads allocate from one heap from now on: glibc returns little memory of other heaps.

    Does nothing with another C library. Call it before other threads start.
    """
    _glibc("mallopt", M_ARENA_MAX, 1)


def _glibc(function: str, *arguments: int) -> None:
    called = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    if called is not None:
        called(*arguments)


def _field(path: str, name: str) -> float:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        raise SatchelError(f"{path} does not exist: memory can only be measured on Linux") from None
    return next(int(line.split()[1]) / KIB_PER_MIB for line in lines if line.startswith(name))
