"""Which model families are tested, and which are known not to work, with the reason."""

from __future__ import annotations

from satchel.export.checkpoint import Checkpoint
from satchel.export.errors import ExportError

REFUSED: dict[str, str] = {}
"""`model_type` -> why satchel cannot export it."""


def check_family(checkpoint: Checkpoint) -> None:
    """Refuse a family that is known not to work.

    Raises:
        ExportError: The family is one of these; the message says why.
    """
    reason = REFUSED.get(checkpoint.model_type)
    if reason is not None:
        raise ExportError(f"{checkpoint.name}: model_type {checkpoint.model_type} is not supported: {reason}")
