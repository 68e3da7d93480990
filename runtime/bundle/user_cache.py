"""Bundles in the user's cache: specialized copies of read-only bundles, and exports of checkpoints.

Each is a folder in `$XDG_CACHE_HOME/satchel/bundles` (or under `~/.cache`) and is added atomically. Beyond
`LIMIT_BYTES`, the least recently used ones are removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from satchel.runtime.bundle.hash_cache import cache_folder
from satchel.runtime.bundle.scratch import scratch_folder, sweep

LIMIT_BYTES = 20 << 30

MADE, GONE = ".new-", ".gone-"
"""Name prefixes of folders that are being made and removed."""


def bundles_folder() -> Path:
    """The folder of the bundles; it may not exist yet."""
    return cache_folder() / "bundles"


def find(name: str) -> Path | None:
    """The bundle with this name, marked as used now; None if there is none."""
    path = bundles_folder() / name
    with contextlib.suppress(OSError):
        os.utime(path)
        return path
    return None


@contextlib.contextmanager
def adding(name: str) -> Iterator[Path]:
    """A path at which the block creates a folder; it then gets this name and replaces any earlier one.

    Raises OSError.
    """
    folder = bundles_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder, MADE) as stage:
        yield stage / "bundle"
        shutil.rmtree(folder / name, ignore_errors=True)
        (stage / "bundle").rename(folder / name)
    evict(keep=name)


def evict(keep: str) -> None:
    """Remove the least recently used bundles until the rest take at most `LIMIT_BYTES`; `keep` stays."""
    used = []
    with contextlib.suppress(OSError):
        used = [(path.stat().st_mtime, _size(path), path) for path in bundles_folder().iterdir() if path.is_dir()]
    total = sum(size for _, size, _ in used)
    for _, size, path in sorted(used):
        if total > LIMIT_BYTES and path.name != keep and not path.name.startswith("."):
            remove(path)
            total -= size
    sweep(bundles_folder(), GONE)


def remove(path: Path) -> None:
    """Remove a bundle atomically."""
    gone = path.with_name(f"{GONE}{os.getpid()}-{path.name}")
    with contextlib.suppress(OSError):
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
