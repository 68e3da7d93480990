"""Where bytes lie on disk: a file of its own, or a part of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """`length` bytes at `offset` of the file `path`. `whole` says that they are the file."""

    path: Path
    offset: int
    length: int
    whole: bool

    def read(self) -> bytes:
        """All of the bytes. Raises OSError; may be fewer than `length` where the file was cut short meanwhile."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)
