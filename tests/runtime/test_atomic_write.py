"""Files that a user named are written whole, or what was there stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from support.full_disk import largest_file

from satchel.runtime.bundle.atomic_write import atomic_write, check_target, write_parts
from satchel.runtime.errors import SatchelError


def test_a_file_is_written_and_replaced_with_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for text in ("first", "second: 猫 \ud800"):
        atomic_write(path, text, "--html")
    assert path.read_text(encoding="utf-8") == r"second: 猫 \ud800"
    atomic_write(path, b"\xff\x00", "--html")
    assert path.read_bytes() == b"\xff\x00"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write(tmp_path / "link", "text", "--html")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text(encoding="utf-8") == "text"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old", encoding="utf-8")

    def full() -> Iterator[bytes]:
        yield b"new"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SatchelError, match=r"--html .*page\.html: cannot be written \(No space left on device\)"):
        write_parts(path, full(), "--html")
    with largest_file(4096), pytest.raises(SatchelError, match=r"--html .*page\.html: cannot be written \(.*\)"):
        atomic_write(path, "new" * 4096, "--html")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_parts_are_taken_one_at_a_time_and_an_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "page.bin"
    buffer = bytearray(2)

    def parts(count: int) -> Iterator[memoryview]:
        for number in range(count):
            buffer[:] = bytes([number, number])
            yield memoryview(buffer)
        if count == 2:
            raise KeyboardInterrupt

    write_parts(path, parts(3), "--html")
    with pytest.raises(KeyboardInterrupt):
        write_parts(path, parts(2), "--html")
    assert path.read_bytes() == bytes([0, 0, 1, 1, 2, 2])
    assert list(tmp_path.iterdir()) == [path]


def test_threads_write_beside_each_other(tmp_path: Path) -> None:
    together = Barrier(2)

    def parts(name: bytes) -> Iterator[bytes]:
        for _ in range(3):
            together.wait(10)
            yield name

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(write_parts, tmp_path / name, parts(name.encode()), "--html") for name in "ab"]
        for job in jobs:
            job.result()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"aaa", "b": b"bbb"}


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("x" * 999, "zero\0", "loop"):
        with pytest.raises(SatchelError, match=r"--html .*: not a valid file name \(.*\)"):
            atomic_write(tmp_path / name, "text", "--html")


def test_what_is_no_plain_file_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "folder", "this is a folder"),
        (tmp_path / "pipe", "pipe"),
        (tmp_path / "missing" / "page.html", f"there is no folder {tmp_path / 'missing'}"),
        (tmp_path / "pipe" / "page.html", "there is no folder"),
    ):
        with pytest.raises(SatchelError, match=message):
            check_target(path, "--html")
        with pytest.raises(SatchelError, match=message):
            atomic_write(path, "text", "--html")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(SatchelError, match="its folder cannot be written to"):
        check_target(tmp_path / "page.html", "--html")
