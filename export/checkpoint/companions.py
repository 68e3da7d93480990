"""The files of a checkpoint that go into the bundle beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from satchel.export.errors import ExportError
from satchel.runtime.generation.generation_config import FILE, complaints, without_wrong

_CONFIG = "tokenizer_config.json"
_PATTERNS = ("generation_config.json", _CONFIG, "LICENSE*", "NOTICE*", "README.md")


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


def folder_companions(folder: Path) -> dict[str, Path]:
    """Return the companions in a checkpoint folder apart from chat templates: configs, license, notices, model card."""
    return {path.name: path for pattern in _PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file()}


def with_names(companions: Mapping[str, bytes | Path], names: Mapping[str, str | None]) -> dict[str, bytes | Path]:
    """Put the names of special tokens, of whatever file they are, into the companions' tokenizer_config.json."""
    stored = companions.get(_CONFIG)
    table = read_json(stored) if isinstance(stored, Path) else {}
    changed = {name: text for name, text in names.items() if name not in table or _text(table[name]) != text}
    if not changed:
        return dict(companions)
    return {**companions, _CONFIG: json.dumps(table | changed, indent=2, ensure_ascii=False).encode()}


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def generation_complaints(companions: Mapping[str, bytes | Path], vocabulary: int) -> list[str]:
    """What is wrong with the checkpoint's generation_config.json, and which of its keys are not followed."""
    if FILE not in companions:
        return []
    document = _generation_config(companions[FILE])
    if document is None:
        return ["not a JSON object: correct the file; now it is left out"]
    return complaints(document, vocabulary)


def without_wrong_settings(companions: Mapping[str, bytes | Path], vocabulary: int) -> dict[str, bytes | Path]:
    """Return the companions without what `generation_complaints` calls wrong: values, or the whole file."""
    if FILE not in companions:
        return dict(companions)
    document = _generation_config(companions[FILE])
    kept = {} if document is None else without_wrong(document, vocabulary)
    if kept == document:
        return dict(companions)
    return {**companions, FILE: json.dumps(kept, indent=2, ensure_ascii=False).encode()}


def _generation_config(stored: bytes | Path) -> dict[str, Any] | None:
    """The parsed file; None where it is not a JSON object."""
    try:
        document = json.loads(stored if isinstance(stored, bytes) else stored.read_bytes())
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
