"""How much memory this process holds, as Linux reports it. Standard library only."""

from __future__ import annotations

from pathlib import Path

from satchel.runtime.errors import SatchelError

KIB_PER_MIB = 1024


def peak_rss_mib() -> float:
    """The largest resident set size that the process has had, in MiB. Raises SatchelError off Linux."""
    return _field("/proc/self/status", "VmHWM:")


def pss_mib() -> float:
    """The proportional set size now, in MiB: a file page that several mappings share counts once.

    Raises SatchelError off Linux.
    """
    return _field("/proc/self/smaps_rollup", "Pss:")


def _field(path: str, name: str) -> float:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        raise SatchelError(f"{path} is not there: memory can be measured on Linux only") from None
    return next(int(line.split()[1]) / KIB_PER_MIB for line in lines if line.startswith(name))
