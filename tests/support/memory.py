"""The memory of this process."""

from __future__ import annotations

from pathlib import Path


def anonymous_mib() -> float:
    """The pages that belong to no file, in MiB: what other processes map or let go does not change them."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024
