"""Reads checkpoints that are quantized already."""

from satchel.export.checkpoint.quantized.formats import not_followed, read_quantized, settings_of, turned

__all__ = ["not_followed", "read_quantized", "settings_of", "turned"]
