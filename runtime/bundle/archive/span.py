"""A range of bytes on disk: a whole file, or a part of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """`length` bytes at `offset` of the file `path`. `whole` says that they are the whole file."""

    path: Path
    offset: int
    length: int
    whole: bool

    def read(self) -> bytes:
        """The bytes, fewer than `length` if the file was truncated in the meantime. Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)
