"""Arguments of `satchel export`, commands in processes of their own, and what lies in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SATCHEL = [sys.executable, "-m", "satchel.runtime.cli.main"]


def in_float(*arguments: object) -> list[str]:
    """The arguments of an export, with `--precision fp32` where they name neither a precision nor a target."""
    words = [str(argument) for argument in arguments]
    return words if {"--precision", "-p", "--target"} & set(words) else [*words, "--precision", "fp32"]


def satchel(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`satchel` in a process of its own; see `in_float` for what an export is without a precision."""
    name, *rest = map(str, arguments)
    command = [*SATCHEL, name, *(in_float(*rest) if name == "export" else rest)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, hidden ones too, with its size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = os.lstat(path)
        found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns)
    return found
