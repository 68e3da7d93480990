"""Compiles a checkpoint into a bundle; needs the packages of the extra "export". Importing it loads none of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from satchel.export.checkpoint import ModuleFacts
    from satchel.export.compile import export_bundle
    from satchel.export.config import ExportConfig
    from satchel.export.errors import ExportError

__all__ = ["ExportConfig", "ExportError", "ModuleFacts", "export_bundle"]

_HOMES = {"ExportConfig": "config", "ExportError": "errors", "ModuleFacts": "checkpoint", "export_bundle": "compile"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
