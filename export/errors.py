"""The error that a checkpoint, or a request to export one, can cause."""

from __future__ import annotations

from satchel.runtime.errors import SatchelError


class ExportError(SatchelError):
    """A checkpoint cannot be exported; the message names the file, what was found in it and what to do."""
