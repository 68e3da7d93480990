"""Tells a bundle from a checkpoint, for messages that name what a path really is. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

GGUF_MAGIC = b"GGUF"
MANIFEST, CHECKPOINT_CONFIG = "manifest.json", "config.json"
PACKED_START = b"#!/usr/bin/env python3\nPK\x03\x04"
"""What a packed bundle begins with: a line for the shell, and the first entry of a zip file."""


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder of Hugging Face or a GGUF file, which satchel export takes."""
    if path.is_dir():
        return (path / CHECKPOINT_CONFIG).is_file() and not os.path.lexists(path / MANIFEST)
    return _begins(path, GGUF_MAGIC)


def is_made_by_satchel(path: Path) -> bool:
    """Whether this is a folder with a manifest, or a packed file."""
    return (path / MANIFEST).is_file() or _begins(path, PACKED_START)


def is_locked(path: Path) -> bool:
    """Whether something is there that this user may not read."""
    return path.exists() and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0))


def _begins(path: Path, content: bytes) -> bool:
    if not path.is_file():  # a pipe would have to be waited for
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(content)) == content
    except OSError:
        return False
