"""Files that a user named are written whole, or what was there stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from satchel.runtime.errors import SatchelError
from satchel.runtime.whole_file import check_target, write_whole


def test_a_file_is_written_and_replaced_with_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for text in ("first", "second: 猫 \ud800"):
        write_whole(path, text, "--html")
    assert path.read_text(encoding="utf-8") == r"second: 猫 \ud800"
    write_whole(path, b"\xff\x00", "--html")
    assert path.read_bytes() == b"\xff\x00"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", "text", "--html")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text(encoding="utf-8") == "text"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old", encoding="utf-8")

    def full(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(SatchelError, match=r"--html .*page\.html: cannot be written \(No space left on device\)"):
            write_whole(path, "new", "--html")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_plain_file_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "folder", "this is a folder"),
        (tmp_path / "pipe", "this is no plain file"),
        (tmp_path / "missing" / "page.html", f"there is no folder {tmp_path / 'missing'}"),
        (tmp_path / "pipe" / "page.html", "there is no folder"),
    ):
        with pytest.raises(SatchelError, match=message):
            check_target(path, "--html")
        with pytest.raises(SatchelError, match=message):
            write_whole(path, "text", "--html")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(SatchelError, match="its folder cannot be written to"):
        check_target(tmp_path / "page.html", "--html")
