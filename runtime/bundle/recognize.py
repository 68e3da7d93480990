"""Tells bundles and checkpoints apart, for messages that say what a path is. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

GGUF_MAGIC = b"GGUF"
MANIFEST, CHECKPOINT_CONFIG = "manifest.json", "config.json"
PACKED_START = b"#!/usr/bin/env python3\nPK\x03\x04"
"""The first bytes of a packed bundle: a shebang line, and the first entry of a zip file."""


def is_checkpoint(path: Path) -> bool:
    """Whether this is a Hugging Face folder or a GGUF file, an input of satchel export."""
    if path.is_dir():
        return (path / CHECKPOINT_CONFIG).is_file() and not os.path.lexists(path / MANIFEST)
    return _begins(path, GGUF_MAGIC)


def is_made_by_satchel(path: Path) -> bool:
    """Whether this is a folder with a manifest, or a packed file."""
    return (path / MANIFEST).is_file() or _begins(path, PACKED_START)


def is_locked(path: Path) -> bool:
    """Whether the path exists and this user has no permission to read it."""
    return path.exists() and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0))


def _begins(path: Path, content: bytes) -> bool:
    if not path.is_file():  # reading a pipe could block
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(content)) == content
    except OSError:
        return False
