"""Writes a file that a user named whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from satchel.runtime.errors import SatchelError


def check_target(path: Path, option: str) -> None:
    """Refuse a path that `write_whole` could not write to, before there is anything to write.

    `option` is the flag that named it, for messages. A file that is there already is fine. Raises SatchelError.
    """
    if path.is_dir():
        raise SatchelError(f"{option} {path}: this is a folder: name a file in it")
    # Renaming would put a plain file in the place of a device or a pipe.
    if path.exists() and not path.is_file():
        raise SatchelError(f"{option} {path}: this is no plain file: name another")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise SatchelError(f"{option} {path}: there is no folder {folder}: make it first or name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SatchelError(f"{option} {path}: its folder cannot be written to: name another")


def write_whole(path: Path, content: str | bytes, option: str) -> None:
    """Write `content` into a file beside `path`, text as UTF-8, then give it that name; a link is followed.

    What cannot be encoded is written as an escape. Raises SatchelError, and leaves what was there, on any failure.
    """
    check_target(path, option)
    target = path.resolve()
    part = target.with_name(f".satchel-{os.getpid()}.part")
    try:
        try:
            part.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise SatchelError(f"{option} {path}: cannot be written ({error.strerror}): name another file") from None
