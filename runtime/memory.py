"""How much memory this process holds, as Linux reports it. Standard library only."""

from __future__ import annotations

import resource
from pathlib import Path

MIB = 1 << 20


def peak_rss_mib() -> float:
    """The largest resident set size that the process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB


def pss_mib() -> float:
    """The proportional set size now, in MiB: a file page that several mappings share counts once."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
