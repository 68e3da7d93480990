"""What a chat template may use up; the process that renders and the one that waits for it both read it."""

from __future__ import annotations

SECONDS = 2.0
"""By the clock, for compiling a template and for each rendering."""

OUTPUT_BYTES = 1_000_000
"""Of the rendered text, in UTF-8."""

MEMORY_BYTES = 512 << 20
"""Of address space of the process that renders."""
