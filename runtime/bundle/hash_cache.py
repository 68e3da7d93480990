"""SHA-256 of files, and a cache of the hashes, so that a bundle is read in full only once."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from satchel.runtime.bundle.archive.span import Span

READ_SIZE = 1 << 20  # bytes

Identity = list[int]


def file_identity(path: Path) -> Identity:
    """Size in bytes, inode and modification time in nanoseconds: they change when the file does."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns]


def sha256_of(path: Path, advance: Callable[[int], object], offset: int = 0, length: int | None = None) -> str:
    """The SHA-256 of a file, or of `length` bytes at `offset` of it, as hex digits.

    `advance` is called with the number of bytes of each read. Raises OSError.
    """
    import hashlib  # it loads a 3 MiB library, which is not needed if the hash is cached

    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        rest = file.seek(0, os.SEEK_END) - offset if length is None else length
        file.seek(offset)
        while rest > 0 and (part := file.read(min(READ_SIZE, rest))):
            digest.update(part)
            rest -= len(part)
            advance(len(part))
    return digest.hexdigest()


class HashCache:
    """Hashes by path and file identity, kept in `$XDG_CACHE_HOME/satchel/hashes.json` (or under `~/.cache`).

    A path with a `part` is an entry for a part of that file: a span of a packed bundle, or a manifest's digest. If the
    cache cannot be read or written, files are hashed again.
    """

    def __init__(self, entries: dict[str, tuple[Identity, str]]) -> None:
        self._entries = entries

    @classmethod
    def load(cls) -> HashCache:
        """Read the cache file; one that is missing or damaged gives an empty cache."""
        try:
            entries = json.loads(_cache_file().read_text(encoding="utf-8"))
            return cls({path: (identity, digest) for path, (identity, digest) in entries.items()})
        except (OSError, ValueError, TypeError, AttributeError):
            return cls({})

    def get(self, path: Path, part: str = "") -> str | None:
        """The cached SHA-256 of this file, or None if it is new or has changed."""
        identity, digest = self._entries.get(_key(path, part), (None, None))
        return digest if identity == file_identity(path) else None

    def put(self, path: Path, identity: Identity, digest: str, part: str = "") -> None:
        """Record the SHA-256 of a file whose identity was taken before it was hashed."""
        self._entries[_key(path, part)] = (identity, digest)

    def save(self) -> None:
        """Write the cache file atomically, without files that no longer exist."""
        entries = {key: entry for key, entry in self._entries.items() if os.path.exists(key.partition(_PART)[0])}
        target = _cache_file()
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        with contextlib.suppress(OSError):
            target.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(entries), encoding="utf-8", newline="\n")
            part.replace(target)


def part_of(span: Span) -> str:
    """The key of a span within its file; empty for the whole file."""
    return "" if span.whole else f"{span.offset}+{span.length}"


_PART = "\0"  # in no path


def _key(path: Path, part: str) -> str:
    return f"{path.resolve()}{_PART}{part}" if part else str(path.resolve())


def cache_folder() -> Path:
    """The user's folder for data that can be made again: `$XDG_CACHE_HOME/satchel`, or under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "satchel"


def _cache_file() -> Path:
    return cache_folder() / "hashes.json"
