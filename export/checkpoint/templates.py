"""The chat templates of a checkpoint, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from satchel.export.checkpoint.companions import read_json
from satchel.export.errors import ExportError
from satchel.runtime.errors import PromptError
from satchel.runtime.generation.templates.chat_template import DEFAULT, TEMPLATE_FILE, ChatTemplate, template_file

_CONFIGS = ("tokenizer_config.json", "chat_template.json")
_MORE = "additional_chat_templates"


def folder_templates(folder: Path) -> dict[str, bytes | Path]:
    """Return the chat templates of a folder as files for the bundle.

    As in transformers, files of their own win over what tokenizer_config.json holds. chat_template.json, which some
    processors have instead, comes last.

    Raises:
        ExportError: If one is not a template.
    """
    files = _own_files(folder)
    if files:
        return template_files({name: _read(path) for name, path in files.items()}, str(folder))
    for config in _CONFIGS:
        stored = read_json(folder / config).get("chat_template")
        if stored is not None:
            return template_files(_named(stored, folder / config), str(folder / config))
    return {}


def template_files(templates: Mapping[str, Any], source: str) -> dict[str, bytes | Path]:
    """Return templates by name as files for the bundle, after compiling each.

    Raises:
        ExportError: If one is not a template.
    """
    for name, text in templates.items():
        if not isinstance(text, str):
            raise ExportError(
                f"{source}: its chat template {name!r} is {type(text).__name__} instead of a text; correct or remove it"
            )
        if TEMPLATE_FILE.fullmatch(template_file(name)) is None:
            raise ExportError(f"{source}: its chat template {name!r} has a name that no file can have; rename it")
        try:
            with ChatTemplate(text) as template:
                template.start()
        except PromptError as error:
            reason = str(error).rpartition(": ")[0]
            raise ExportError(f"{source}: its chat template {name!r}: {reason}; correct or remove it") from None
    return {template_file(name): text.encode() for name, text in templates.items()}


def template_sources(folder: Path) -> list[Path]:
    """Return the files of a folder that may hold chat templates."""
    configs = (folder / name for name in _CONFIGS)
    return [*_own_files(folder).values(), *(path for path in configs if path.is_file())]


def _own_files(folder: Path) -> dict[str, Path]:
    """The files that hold one template each, by the name of the template."""
    default = folder / "chat_template.jinja"
    more = {path.stem: path for path in sorted((folder / _MORE).glob("*.jinja"))}
    return {DEFAULT: default, **more} if default.is_file() else more


def _named(stored: Any, path: Path) -> dict[str, Any]:
    """One template, a list of named ones, or an object of them."""
    if isinstance(stored, str):
        return {DEFAULT: stored}
    if isinstance(stored, dict) and stored:
        return stored
    if isinstance(stored, list) and stored and all(isinstance(entry, dict) and "name" in entry for entry in stored):
        return {str(entry["name"]): entry.get("template") for entry in stored}
    raise ExportError(
        f"{path}: chat_template is {type(stored).__name__} instead of a text or a list of named ones; "
        "correct or remove it"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ExportError(f"{path}: not UTF-8 text; convert it to UTF-8") from None
