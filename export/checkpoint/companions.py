"""The files of a checkpoint that are copied into the bundle unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from satchel.export.errors import ExportError

_PATTERNS = ("generation_config.json", "tokenizer_config.json", "LICENSE*", "NOTICE*", "README.md")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist.

    Raises:
        ExportError: If the file contains anything else.
    """
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_bytes())
    except ValueError:
        raise ExportError(f"{path}: not valid JSON; download it again") from None
    if not isinstance(table, dict):
        raise ExportError(f"{path}: holds {type(table).__name__} instead of a JSON object; download it again")
    return table


def folder_companions(folder: Path) -> dict[str, bytes | Path]:
    """Return the companions in a checkpoint folder: chat template, configs, license, notices, model card."""
    found: dict[str, bytes | Path] = {
        path.name: path for pattern in _PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file()
    }
    template = folder / "chat_template.jinja"
    if template.is_file():
        found[template.name] = template
    else:
        text = _template(read_json(folder / "tokenizer_config.json").get("chat_template"))
        if text is not None:
            found[template.name] = text.encode()
    return found


def _template(stored: Any) -> str | None:
    """Return the template in a tokenizer_config.json, which holds one string or a list of named ones."""
    if isinstance(stored, str):
        return stored
    if isinstance(stored, list):
        named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
        default = named.get("default")
        return default if isinstance(default, str) else None
    return None
