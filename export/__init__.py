"""Compiling a checkpoint into a bundle; needs `pip install 'satchel[export]'`."""

from __future__ import annotations

from satchel.export.checkpoint import ModuleFacts
from satchel.export.compile import export_bundle
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError

__all__ = ["ExportConfig", "ExportError", "ModuleFacts", "export_bundle"]
