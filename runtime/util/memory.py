"""The memory of this process and of the machine, as far as the system reports it. Standard library only."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

KIB_PER_MIB = 1024
BYTES_PER_MIB = 1 << 20
M_ARENA_MAX = -8  # of malloc.h


def peak_rss_mib() -> float | None:
    """The largest resident set size that the process has had, in MiB; None where the system does not report it.

    The peak working set on Windows.
    """
    if sys.platform == "win32":
        # PROCESS_MEMORY_COUNTERS of psapi.h, of 64 bits; -1 is this process.
        counters = _windows("K32GetProcessMemoryInfo", "<II8Q", ctypes.c_void_p(-1), sized=True)
        return counters[2] / BYTES_PER_MIB if counters else None
    found = _field("/proc/self/status", "VmHWM:")
    if found is None:
        try:
            import resource
        except ImportError:
            return None
        unit = BYTES_PER_MIB if sys.platform == "darwin" else KIB_PER_MIB
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return found


def pss_mib() -> float | None:
    """The proportional set size now, in MiB: a file page that several mappings share counts once. None off Linux."""
    return _field("/proc/self/smaps_rollup", "Pss:")


def system_memory() -> tuple[int | None, int | None]:
    """The machine's memory in bytes, total and available without swapping; None for what is not reported."""
    if sys.platform == "win32":
        status = _windows("GlobalMemoryStatusEx", "<II7Q")  # MEMORYSTATUSEX of sysinfoapi.h
        return (status[2], status[3]) if status else (None, None)
    total, available = (_field("/proc/meminfo", name) for name in ("MemTotal:", "MemAvailable:"))
    if total is None or available is None:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
        except (AttributeError, OSError, ValueError):
            return None, None
    return round(total * BYTES_PER_MIB), round(available * BYTES_PER_MIB)


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


def _windows(function: str, layout: str, *arguments: object, sized: bool = False) -> tuple[int, ...]:
    """The fields of the structure that a function of kernel32 fills; it begins with its own size. Empty on failure."""
    content = ctypes.create_string_buffer(struct.pack("<I", struct.calcsize(layout)), struct.calcsize(layout))
    size = (len(content),) if sized else ()
    called = getattr(ctypes.WinDLL("kernel32"), function)  # type: ignore[attr-defined, unused-ignore]
    return struct.unpack(layout, content.raw) if called(*arguments, content, *size) else ()


def _field(path: str, name: str) -> float | None:
    """A number of KiB in a file of Linux, in MiB; None where there is no such file."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / KIB_PER_MIB for line in lines if line.startswith(name)), None)
