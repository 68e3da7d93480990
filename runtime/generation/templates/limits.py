"""Limits of a chat template, shared by the process that renders it and the one that waits for it."""

from __future__ import annotations

SECONDS = 2.0
"""Wall time for compiling a template, and for each rendering."""

OUTPUT_BYTES = 1_000_000
"""Size of the rendered text in UTF-8."""

MEMORY_BYTES = 512 << 20
"""Address space of the process that renders."""
