"""Writes a packed bundle: a zip file with uncompressed, aligned entries."""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from satchel.runtime.bundle.archive import zip_format as form
from satchel.runtime.bundle.archive.span import Span

PAGE = 4096
"""Alignment of a bundle's files in bytes, so that weights keep their own alignment and can be memory-mapped."""

READ_SIZE = 1 << 20

MODE = stat.S_IFREG | 0o644


@dataclass(frozen=True)
class Entry:
    """A file to pack: its name in the zip file, its content in memory or on disk, and the alignment of its data."""

    name: str
    content: bytes | Span
    alignment: int = 1

    @property
    def size(self) -> int:
        """The content's length in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.length

    def blocks(self) -> Iterator[bytes]:
        """The content in blocks. Raises OSError, also if the file on disk has become shorter."""
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.path.open("rb") as file:
            file.seek(self.content.offset)
            rest = self.content.length
            while rest:
                block = file.read(min(READ_SIZE, rest))
                if not block:
                    raise OSError(0, "a file became shorter", str(self.content.path))
                rest -= len(block)
                yield block

    def crc(self) -> int:
        """The content's CRC-32. Raises OSError."""
        found = 0
        for block in self.blocks():
            found = zlib.crc32(block, found)
        return found


@dataclass(frozen=True)
class Placed:
    """An entry with its header: the header starts at `offset`, and the content follows it."""

    entry: Entry
    offset: int
    header: bytes
    record: bytes


def lay_out(prefix: bytes, entries: Iterable[Entry], crcs: Sequence[int]) -> tuple[list[Placed], bytes]:
    """The layout of the entries after the prefix, and the directory at the end. `crcs` are those of the entries."""
    placed, position = [], len(prefix)
    for entry, crc in zip(entries, crcs, strict=True):
        header = _local(entry, crc, position)
        placed.append(Placed(entry, position, header, _central(entry, crc, position)))
        position += len(header) + entry.size
    records = b"".join(one.record for one in placed)
    return placed, records + _end(len(placed), len(records), position)


def zip_parts(prefix: bytes, entries: Sequence[Entry]) -> Iterator[bytes]:
    """The bytes of the whole file, part by part. Reads each content twice. Raises OSError."""
    placed, end = lay_out(prefix, entries, [entry.crc() for entry in entries])
    yield prefix
    for one in placed:
        yield one.header
        yield from one.entry.blocks()
    yield end


def _local(entry: Entry, crc: int, offset: int) -> bytes:
    name, large = entry.name.encode("utf-8"), entry.size >= form.LARGE
    wide = form.EXTRA.pack(form.ZIP_64, 16) + struct.pack("<QQ", entry.size, entry.size) if large else b""
    start = offset + form.LOCAL.size + len(name) + len(wide)
    extra = wide + _padding(start, entry.alignment)
    shown = form.LARGE if large else entry.size
    record = (*_common(large or offset >= form.LARGE), crc, shown, shown, len(name), len(extra))
    return form.LOCAL.pack(form.LOCAL_MAGIC, *record) + name + extra


def _central(entry: Entry, crc: int, offset: int) -> bytes:
    name, large, far = entry.name.encode("utf-8"), entry.size >= form.LARGE, offset >= form.LARGE
    numbers = [entry.size, entry.size] * large + [offset] * far
    wide = struct.pack(f"<HH{len(numbers)}Q", form.ZIP_64, 8 * len(numbers), *numbers) if numbers else b""
    shown = form.LARGE if large else entry.size
    return (
        form.CENTRAL.pack(
            form.CENTRAL_MAGIC,
            form.UNIX | form.VERSION,
            *_common(large or far),
            *(crc, shown, shown, len(name), len(wide), 0, 0, 0),
            *(MODE << 16, form.LARGE if far else offset),
        )
        + name
        + wide
    )


def _common(wide: bool) -> tuple[int, ...]:
    """Version needed, flags, method, time and date: the first fields of both headers of an entry."""
    return (form.VERSION_64 if wide else form.VERSION, form.UTF8, form.STORED, form.DOS_TIME, form.DOS_DATE)


def _padding(start: int, alignment: int) -> bytes:
    """An extra field that aligns content which would start at `start`; empty if it is aligned."""
    if start % alignment == 0:
        return b""
    smallest = form.EXTRA.size + 2
    zeros = -(start + smallest) % alignment
    return form.EXTRA.pack(form.ALIGNMENT, 2 + zeros) + struct.pack("<H", alignment) + bytes(zeros)


def _end(count: int, length: int, start: int) -> bytes:
    narrow = (min(count, form.MANY), min(length, form.LARGE), min(start, form.LARGE))
    few, short, near = narrow
    wide = b""
    if any(a >= b for a, b in zip(narrow, (form.MANY, form.LARGE, form.LARGE), strict=True)):
        wide = form.END_64.pack(
            form.END_64_MAGIC, form.END_64.size - 12, form.UNIX | form.VERSION_64, form.VERSION_64,
            0, 0, count, count, length, start,
        ) + form.LOCATOR_64.pack(form.LOCATOR_64_MAGIC, 0, start + length, 1)  # fmt: skip
    return wide + form.END.pack(form.END_MAGIC, 0, 0, few, few, short, near, 0)
