"""Writes a file that a user named whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from satchel.runtime.bundle.errors import SatchelError
from satchel.runtime.bundle.scratch import sweep


def check_target(path: Path, option: str) -> None:
    """Refuse a path that `atomic_write` could not write to, before there is anything to write.

    `option` is the flag that named it, for messages. A file that is there already is fine. Raises SatchelError.
    """
    try:
        _check_target(path, option)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a zero byte, a link to itself
        reason = getattr(error, "strerror", None) or error
        raise SatchelError(f"{option} {path}: no file can have this name ({reason}): name another") from None


def atomic_write(path: Path, content: str | bytes, option: str) -> None:
    """Write `content` into a file beside `path`, text as UTF-8, then give it that name; a link is followed.

    What cannot be encoded is written as an escape. Raises SatchelError, and leaves what was there, on any failure.
    """
    write_parts(path, [content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content], option)


def write_parts(path: Path, parts: Iterable[bytes | memoryview], option: str) -> None:
    """As `atomic_write`, one part after the other, each taken when the one before is written.

    Whatever ends it early, be it an error while a part is made or an interrupt, leaves what was there.
    """
    check_target(path, option)
    target = path.resolve()
    sweep(target.parent, ".satchel-")
    part_file = target.with_name(f".satchel-{os.getpid()}-{threading.get_ident()}.part")
    try:
        try:
            with part_file.open("wb") as file:
                for part in parts:
                    file.write(part)
            part_file.replace(target)
        finally:
            part_file.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, option, error) from None


def cannot_write(path: Path, option: str, error: OSError) -> SatchelError:
    """The error for what could not be written to a path that the flag `option` named."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SatchelError(f"{option} {path}: cannot be written ({error.strerror}): free space, or name another disk")
    return SatchelError(f"{option} {path}: cannot be written ({error.strerror}): name another")


def _check_target(path: Path, option: str) -> None:
    if path.is_dir():
        raise SatchelError(f"{option} {path}: this is a folder: name a file in it")
    # Renaming would put a plain file in the place of a device or a pipe.
    if path.exists() and not path.is_file():
        raise SatchelError(f"{option} {path}: not a regular file: name another")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise SatchelError(f"{option} {path}: there is no folder {folder}: make it first or name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SatchelError(f"{option} {path}: its folder cannot be written to: name another")
