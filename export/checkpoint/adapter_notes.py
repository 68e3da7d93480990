"""What a user should know of an adapter's folder: files in it that are not those of the base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from satchel.export.checkpoint.record import Checkpoint
from satchel.export.checkpoint.templates import folder_templates

_SETTINGS = ("truncation", "padding")
"""What training leaves in a tokenizer.json, and no encoding here follows."""


def notes_on_adapter(folder: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """A line for a tokenizer, and one for a chat template, that the folder holds and the bundle will not have.

    Raises:
        ExportError: A template in the folder is none.
    """
    file, used = folder / "tokenizer.json", checkpoint.tokenizer
    if used is not None and used.kind == file.name and file.is_file() and _vocabulary(file) != _vocabulary(used.file):
        yield f"{folder}: holds a tokenizer of its own, other than the bundle's: --tokenizer {folder} takes it"
    for name, content in folder_templates(folder).items():
        known = checkpoint.companions.get(name)
        if known is None or _bytes(known) != _bytes(content):
            yield (
                f"{folder}: holds a chat template of its own ({name}), other than the bundle's: put it into the base's "
                "folder, or run satchel chat with --chat-template"
            )


def _vocabulary(file: Path | bytes) -> Any:
    """A tokenizer.json as data; as bytes if it is not a JSON object."""
    content = _bytes(file)
    try:
        table = json.loads(content)
    except ValueError:
        return content
    return {key: value for key, value in table.items() if key not in _SETTINGS} if isinstance(table, dict) else content


def _bytes(content: Path | bytes) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content
