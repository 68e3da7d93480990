"""Sizes are told in the unit that gives a number of at least 1."""

from __future__ import annotations

import pytest

from satchel.runtime.util.sizes import binary, decimal


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 bytes"), (1023, "1,023 bytes"), (1024, "1.0 KiB"), (9600, "9.4 KiB"), (1 << 20, "1.0 MiB"),
        (5 << 31, "10,240.0 MiB"),
    ],
)  # fmt: skip
def test_memory(size: int, expected: str) -> None:
    assert binary(size) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [(999, "999 bytes"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (1.2e10, "12,000.0 MB")]
)
def test_files(size: float, expected: str) -> None:
    assert decimal(size) == expected
