"""Tries a bundle before it is published."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError


def self_check(folder: Path, config: ExportConfig) -> None:
    """Run a bundle as a user will: in a process of its own, without torch.

    Raises:
        ExportError: It does not run.
    """
    command = [sys.executable, "-m", "satchel.runtime.evaluation.selftest", str(folder), *map(str, config.custom_ops)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ExportError(
            f"the exported bundle does not run: {lines[-1] if lines else 'no message'}; "
            f"nothing was written: {'look at your --pass' if config.passes else 'report this model to satchel'}"
        )
