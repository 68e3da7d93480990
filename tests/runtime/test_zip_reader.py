"""The zip reader takes what the zip writer writes, above 4 GiB too, and refuses what has two meanings."""

from __future__ import annotations

import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from satchel.runtime.bundle.archive.packed import packed_files
from satchel.runtime.bundle.archive.span import Span
from satchel.runtime.bundle.archive.zip_reader import read_directory
from satchel.runtime.bundle.archive.zip_writer import Entry, lay_out, zip_parts
from satchel.runtime.errors import BundleError

PREFIX = b"#!/usr/bin/env python3\n"
ENTRIES = [Entry("__main__.py", b"main"), Entry("bundle/ä", b"umlaut", 64), Entry("bundle/empty", b"", 4096)]


def written(path: Path, entries: list[Entry] | None = None, prefix: bytes = PREFIX) -> Path:
    path.write_bytes(b"".join(zip_parts(prefix, ENTRIES if entries is None else entries)))
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    spans = read_directory(written(tmp_path / "a.zip"))
    assert list(spans) == [entry.name for entry in ENTRIES]
    assert [span.read() for span in spans.values()] == [entry.content for entry in ENTRIES]
    assert [span.offset % entry.alignment for span, entry in zip(spans.values(), ENTRIES, strict=True)] == [0, 0, 0]
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        assert file.testzip() is None
    assert list(packed_files(tmp_path / "a.zip")) == ["ä", "empty"]


def test_entries_beyond_4_gib_are_read(tmp_path: Path) -> None:
    """Contents are holes in a sparse file, as long as what is written would be."""
    size = (1 << 32) + 4321
    hole = Span(tmp_path / "nowhere", 0, size, whole=True)
    entries = [Entry("bundle/a", b"first", 4096), Entry("bundle/b", hole, 4096), Entry("bundle/c", b"last", 4096)]
    found, end = lay_out(PREFIX, entries, [entries[0].crc(), 0, entries[2].crc()])
    path = tmp_path / "large.pyz"
    with path.open("wb") as file:
        file.write(PREFIX)
        for one in found:
            file.seek(one.offset)
            file.write(one.header + (one.entry.content if isinstance(one.entry.content, bytes) else b""))
        file.seek(found[-1].offset + len(found[-1].header) + 4)
        file.write(end)
    spans = read_directory(path)
    assert [span.length for span in spans.values()] == [5, size, 4]
    assert all(span.offset % 4096 == 0 for span in spans.values())
    assert (spans["bundle/a"].read(), spans["bundle/c"].read()) == (b"first", b"last")
    with zipfile.ZipFile(path) as other:
        assert [info.file_size for info in other.infolist()] == [5, size, 4]
        assert other.read("bundle/c") == b"last"


def linked(path: Path) -> None:
    info = zipfile.ZipInfo("bundle/link")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(info, b"/etc/passwd")


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bundle/zeros", bytes(1 << 20))


def commented(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("bundle/a", b"a")
        file.comment = b"hello"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "it is too short"),
        *((lambda path, cut=cut: path.write_bytes(b"".join(zip_parts(PREFIX, ENTRIES))[:-cut]), "not a packed bundle")
          for cut in (1, 22, 100)),
        (lambda path: path.write_bytes(b"x" * 100), "it does not end as a zip file without a comment does"),
        (commented, "it does not end as a zip file without a comment does"),
        (bomb, "'bundle/zeros' is compressed"),
        (linked, "'bundle/link' is not a regular file"),
        (lambda path: written(path, prefix=b"MZ\n"), "something lies in front of its first entry"),
        (lambda path: written(path, [Entry("bundle/a", b"")] * 2), "two entries have one name"),
        (lambda path: written(path, [Entry("bundle/a", b""), Entry("bundle/A", b"")]), "are the same on some file"),
        (lambda path: written(path, [Entry("bundle/../a", b"")]), "the name 'bundle/../a' leads outside"),
        (lambda path: written(path, [Entry("bundle/nul.bin", b"")]), "'bundle/nul.bin' is not a file name on Windows"),
        *((lambda path, name=name: written(path, [Entry(name, b"")]), "leads outside")
          for name in ("/etc/passwd", "bundle/a\\b", "bundle/folder/")),
    ],
)  # fmt: skip
def test_a_zip_file_of_another_kind_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "a.pyz")
    with pytest.raises(BundleError, match=message) as error:
        read_directory(tmp_path / "a.pyz")
    assert "\n" not in str(error.value)


def changed(content: bytes, position: int, field: str, value: int) -> bytes:
    size = struct.calcsize(field)
    return content[:position] + struct.pack(field, value) + content[position + size :]


LOCAL = [
    (0, "<I", 0), (4, "<H", 45), (6, "<H", 1), (8, "<H", 8), (10, "<H", 5), (12, "<H", 5), (14, "<I", 5),
    (18, "<I", 3), (22, "<I", 3), (26, "<H", 10), (28, "<H", 5), (30, "<B", 88),
]  # fmt: skip
CENTRAL = [
    (0, "<I", 0), (6, "<H", 45), (8, "<H", 1), (8, "<H", 8), (10, "<H", 8), (12, "<H", 5), (16, "<I", 5),
    (20, "<I", 3), (24, "<I", 3), (28, "<H", 10), (30, "<H", 5), (32, "<H", 1), (34, "<H", 1), (38, "<I", 0),
    (42, "<I", 0), (42, "<I", 99), (46, "<B", 88), (24, "<I", 0xFFFFFFFF),
]  # fmt: skip


@pytest.mark.parametrize(
    ("signature", "offset", "field", "value"),
    [*((b"PK\x03\x04", *change) for change in LOCAL), *((b"PK\x01\x02", *change) for change in CENTRAL)],
)
def test_a_local_header_that_differs_from_its_directory_entry_is_refused(
    tmp_path: Path, signature: bytes, offset: int, field: str, value: int
) -> None:
    path = written(tmp_path / "a.pyz")
    content = path.read_bytes()
    start = content.index(signature)
    path.write_bytes(changed(content, start + offset, field, value))
    with pytest.raises(BundleError, match="not a packed bundle"):
        read_directory(path)


def test_bytes_that_belong_to_no_entry_are_refused(tmp_path: Path) -> None:
    found, end = lay_out(PREFIX, ENTRIES, [entry.crc() for entry in ENTRIES])
    parts = [PREFIX, *(one.header + bytes(one.entry.content) for one in found)]  # type: ignore[arg-type]
    start = sum(map(len, parts))
    hidden = b"PK\x03\x04 hidden"
    moved = end[:-6] + struct.pack("<IH", start + len(hidden), 0)
    (tmp_path / "a.pyz").write_bytes(b"".join(parts) + hidden + moved)
    with pytest.raises(BundleError, match="bytes in it belong to no entry"):
        read_directory(tmp_path / "a.pyz")


def test_what_is_no_part_of_a_packed_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"'numpy/__init__\.py' is not one of its parts"):
        packed_files(written(tmp_path / "a.pyz", [Entry("numpy/__init__.py", b"")]))
