"""Reads checkpoints that are quantized already."""

from satchel.export.checkpoint.quantized.formats import read_quantized, settings_of

__all__ = ["read_quantized", "settings_of"]
