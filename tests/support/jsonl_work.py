"""`satchel run --input`, on files of a test's own folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.command import Satchel

Row = dict[str, Any]
COMMAND = [sys.executable, "-m", "satchel.runtime.cli.main"]


class Work:
    """A folder with an input, an output, and a bundle to run the one into the other."""

    def __init__(self, satchel: Satchel, bundle: Path, folder: Path) -> None:
        self.bundle, self.input, self.output = bundle, folder / "in.jsonl", folder / "out.jsonl"
        self._satchel = satchel

    def write(self, *lines: object) -> None:
        """Write the input: bytes as they are, everything else as JSON."""
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        self.input.write_bytes(b"\n".join(raw) + b"\n")

    def arguments(self, *more: object) -> list[str]:
        files = ("--input", self.input, "--output", self.output)
        return ["run", str(self.bundle), "--threads", "1", *map(str, (*files, *more))]

    def run(self, *more: object, code: int = 0) -> str:
        """What the command says on standard error, which must end with exit code `code`."""
        return self._satchel(*self.arguments(*more), code=code).err

    def start(self, *more: object, **settings: Any) -> subprocess.Popen[bytes]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*COMMAND, *self.arguments(*more)], **pipes, **settings)

    def rows(self) -> list[Row]:
        return [json.loads(line) for line in self.output.read_text("utf-8").splitlines()]


def by_id(rows: Sequence[Row]) -> dict[str | int, Row]:
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found
