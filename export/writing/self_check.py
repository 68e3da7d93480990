"""Tries a bundle before it is published."""

from __future__ import annotations

from pathlib import Path

from satchel.export.ahead import Helper
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError

SELFTEST = "satchel.runtime.evaluation.selftest"
"""The module of the process that tries it."""


def self_check(folder: Path, config: ExportConfig, selftest: Helper) -> None:
    """Run a bundle as a user will: in a process of its own, without torch. `selftest` runs `SELFTEST`.

    Raises:
        ExportError: It does not run.
    """
    selftest.tell([str(folder), *map(str, config.custom_ops)])
    complaint = selftest.finish()
    if complaint is not None:
        raise ExportError(
            f"the exported bundle does not run: {complaint}; "
            f"nothing was written: {'look at your --pass' if config.passes else 'report this model to satchel'}"
        )
