"""Reads the directory of a packed bundle, and accepts only what `satchel pack` writes: other zip files are ambiguous.

Zip readers disagree if the local header of an entry differs from the directory, if entries overlap, or if bytes belong
to no entry. All of that is refused here before any entry is read. `zipfile` is not strict enough: it does not say where
an entry's data begins, compares only the name in the local header, skips gaps and data before or after the archive,
and accepts duplicate entries.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from satchel.runtime.bundle.archive import zip_format as form
from satchel.runtime.bundle.archive.span import Span
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.limits import LIMITS
from satchel.runtime.bundle.names import equal_names, impossible_on_windows, leads_outside, too_long

LONGEST_PREFIX = 128
"""The maximum bytes of the shebang line before the first entry."""


@dataclass(frozen=True)
class _Entry:
    """An entry of the central directory; `record` are the fields that its local header must repeat."""

    name: bytes
    record: tuple[int, ...]
    size: int
    offset: int


class _Odd(ValueError):
    """The file differs from what `satchel pack` writes; the message says how."""


def read_directory(path: Path) -> dict[str, Span]:
    """The spans of the entries of a packed bundle by name, in file order.

    Raises BundleError for a file that is not a zip file, and for one that `satchel pack` would not have written: with
    compression, encryption, comments, links, a name that is a duplicate or leads outside, overlaps or gaps between
    entries, or a local header that differs from the directory.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            entries, start = _central(file, size)
            return _spans(path, file, entries, start)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}): check its permissions") from None
    except (_Odd, struct.error) as error:
        raise BundleError(
            f"{path}: not a packed bundle ({error}): give a bundle made by satchel export or satchel pack"
        ) from None


def _central(file: BinaryIO, size: int) -> tuple[list[_Entry], int]:
    count, length, start = _end(file, size)
    _require(count <= LIMITS["packed entries"].most, f"{count:,} entries")
    _require(length <= LIMITS["packed directory bytes"].most, f"a directory of {length:,} bytes")
    file.seek(start)
    content = file.read(length)
    entries, position = [], 0
    for _ in range(count):
        entry, position = _central_entry(content, position)
        entries.append(entry)
    _require(position == length, "its directory does not end where it says")
    return entries, start


def _end(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Number of entries, length and start of the central directory, which must end where these records begin."""
    position = size - form.END.size
    _require(position >= 0, "it is too short")
    magic, disk, first, here, count, length, start, comment = form.END.unpack(_at(file, position, form.END.size))
    _require(magic == form.END_MAGIC, "it does not end as a zip file without a comment does")
    _require((disk, first, here, comment) == (0, 0, count, 0), "it is in several parts or has a comment")
    if count == form.MANY or form.LARGE in (length, start):
        position -= form.LOCATOR_64.size + form.END_64.size
        _require(position >= 0, "it is too short")
        magic, disk, place, disks = form.LOCATOR_64.unpack(_at(file, position + form.END_64.size, form.LOCATOR_64.size))
        there = (magic, disk, place, disks) == (form.LOCATOR_64_MAGIC, 0, position, 1)
        _require(there, "its Zip64 locator points elsewhere")
        fields = form.END_64.unpack(_at(file, position, form.END_64.size))
        magic, rest, _, _, disk, first, here, wide_count, wide_length, wide_start = fields
        _require(magic == form.END_64_MAGIC and rest == form.END_64.size - 12, "its Zip64 end is another")
        _require((disk, first, here) == (0, 0, wide_count), "it is in several parts")
        for narrow, wide, most in (
            (count, wide_count, form.MANY),
            (length, wide_length, form.LARGE),
            (start, wide_start, form.LARGE),
        ):
            _require(narrow in (wide, most), "its two ends differ")
        count, length, start = wide_count, wide_length, wide_start
    _require(start + length == position, "its directory is not where its end says")
    return count, length, start


def _central_entry(content: bytes, position: int) -> tuple[_Entry, int]:
    fields = form.CENTRAL.unpack_from(content, position)
    magic, made, needed, flags, method, time, date, crc, packed, size = fields[:10]
    name_length, extra_length, comment, disk, _, attributes, offset = fields[10:]
    _require(magic == form.CENTRAL_MAGIC, "its directory has another record")
    position += form.CENTRAL.size
    name = content[position : position + name_length]
    position += name_length
    extra = content[position : position + extra_length]
    position += extra_length
    _require(position <= len(content), "its directory is cut short")
    _require(method == form.STORED, f"{name!r} is compressed")
    _require(flags in (0, form.UTF8), f"{name!r} is encrypted or has its sizes behind it")
    _require((comment, disk) == (0, 0), f"{name!r} has a comment or is elsewhere")
    _require(made >> 8 == form.UNIX >> 8 and stat.S_ISREG(attributes >> 16), f"{name!r} is not a regular file")
    wide = _wide(extra)
    size_64 = wide.pop(0) if size == form.LARGE and wide else size
    packed_64 = wide.pop(0) if packed == form.LARGE and wide else packed
    offset_64 = wide.pop(0) if offset == form.LARGE and wide else offset
    _require(not wide and size_64 == packed_64, f"{name!r} has sizes that differ")
    return _Entry(name, (needed, flags, method, time, date, crc), size_64, offset_64), position


def _wide(extra: bytes) -> list[int]:
    """The numbers of a Zip64 field, the only extra field allowed in the directory."""
    if not extra:
        return []
    kind, length = form.EXTRA.unpack_from(extra)
    fits = kind == form.ZIP_64 and length == len(extra) - form.EXTRA.size and length in (8, 16, 24)
    _require(fits, "its directory has an extra field of another kind")
    return list(struct.unpack_from(f"<{length // 8}Q", extra, form.EXTRA.size))


def _spans(path: Path, file: BinaryIO, entries: list[_Entry], end: int) -> dict[str, Span]:
    spans: dict[str, Span] = {}
    position = _prefix(file, entries)
    for entry in entries:
        _require(entry.offset == position, f"{entry.name!r} overlaps with another entry or leaves a gap")
        data = _local(file, entry)
        spans[_text(entry.name)] = Span(path, data, entry.size, whole=False)
        position = data + entry.size
        _require(position <= end, f"{entry.name!r} goes on beyond the entries")
    _require(position == end, "bytes in it belong to no entry")
    _require(len(spans) == len(entries), "two entries have one name")
    twins = equal_names(spans)
    _require(twins is None, f"the names {twins} are the same on some file systems")
    return spans


def _prefix(file: BinaryIO, entries: list[_Entry]) -> int:
    start = entries[0].offset if entries else 0
    _require(start <= LONGEST_PREFIX, "something lies in front of its first entry")
    line = _at(file, 0, start)
    wanted = not line or (line.startswith(b"#!") and line.index(b"\n") == len(line) - 1 if b"\n" in line else False)
    _require(wanted, "something lies in front of its first entry")
    return start


def _local(file: BinaryIO, entry: _Entry) -> int:
    """Check an entry's local header against the directory. Returns the offset of its data."""
    fields = form.LOCAL.unpack(_at(file, entry.offset, form.LOCAL.size))
    magic, *record, packed, size, name_length, extra_length = fields
    _require(magic == form.LOCAL_MAGIC and tuple(record) == entry.record, f"{entry.name!r} is described in two ways")
    rest = _at(file, entry.offset + form.LOCAL.size, name_length + extra_length)
    extra = rest[name_length:]
    sizes = [packed, size]
    while extra:
        kind, length = form.EXTRA.unpack_from(extra)
        body, extra = extra[form.EXTRA.size : form.EXTRA.size + length], extra[form.EXTRA.size + length :]
        _require(kind in (form.ZIP_64, form.ALIGNMENT), f"{entry.name!r} has an extra field of another kind")
        if kind == form.ZIP_64 and length == 16 and sizes == [form.LARGE, form.LARGE]:
            sizes = list(struct.unpack("<QQ", body))
    same = rest[:name_length] == entry.name and sizes == [entry.size, entry.size]
    _require(same, f"{entry.name!r} is described in two ways")
    return entry.offset + form.LOCAL.size + len(rest)


def _text(name: bytes) -> str:
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise _Odd(f"the name {name[:60]!r} is not UTF-8") from None
    _require(not leads_outside(text) and not too_long(text), f"the name {text[:60]!r} leads outside")
    _require(not impossible_on_windows(text), f"the name {text[:60]!r} is not a file name on Windows")
    return text


def _at(file: BinaryIO, position: int, length: int) -> bytes:
    file.seek(position)
    content = file.read(length)
    _require(len(content) == length, "it is cut short")
    return content


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _Odd(reason)
