"""Sizes for people. Standard library only."""

from __future__ import annotations


def binary(size: int) -> str:
    """Memory in bytes, KiB or MiB, whichever gives a number of at least 1."""
    return _in_units(size, 1024, ("KiB", "MiB"))


def decimal(size: float) -> str:
    """Bytes of a file, or that a step moves, in bytes, kB or MB."""
    return _in_units(size, 1000, ("kB", "MB"))


def _in_units(size: float, base: int, units: tuple[str, str]) -> str:
    if size < base:
        return f"{size:,.0f} bytes"
    power = 1 if size < base**2 else 2
    return f"{size / base**power:,.1f} {units[power - 1]}"
