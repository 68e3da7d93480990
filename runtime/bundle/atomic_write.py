"""Atomic writes of files that a user named."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from satchel.runtime.bundle.errors import SatchelError
from satchel.runtime.bundle.scratch import sweep


def check_target(path: Path, option: str) -> None:
    """Check in advance that `atomic_write` can write to a path, which may be an existing file.

    `option` is the flag that named it, for messages. Raises SatchelError.
    """
    try:
        _check_target(path, option)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a name that is too long or has a null byte, or a link to itself
        reason = getattr(error, "strerror", None) or error
        raise SatchelError(f"{option} {path}: not a valid file name ({reason}): choose another") from None


def atomic_write(path: Path, content: str | bytes, option: str) -> None:
    """Write `content` into a file beside `path`, text as UTF-8, then give it that name; a link is followed.

    Characters that cannot be encoded are escaped. On any failure it raises SatchelError and changes nothing.
    """
    write_parts(path, [content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content], option)


def write_parts(path: Path, parts: Iterable[bytes | memoryview], option: str) -> None:
    """As `atomic_write`, with an iterator of parts, each requested after the previous one is written.

    An error in the iterator or an interrupt leaves an existing file unchanged.
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
    """The error for a path, named by the flag `option`, that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SatchelError(
            f"{option} {path}: cannot be written ({error.strerror}): free space, or choose another disk"
        )
    return SatchelError(f"{option} {path}: cannot be written ({error.strerror}): choose another path")


def _check_target(path: Path, option: str) -> None:
    if path.is_dir():
        raise SatchelError(f"{option} {path}: this is a folder: give a file in it")
    # Renaming would replace a device or a pipe with a regular file.
    if path.exists() and not path.is_file():
        raise SatchelError(f"{option} {path}: not a regular file: choose another path")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise SatchelError(f"{option} {path}: there is no folder {folder}: create it, or choose another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SatchelError(f"{option} {path}: its folder cannot be written to: choose another path")
