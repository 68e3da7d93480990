"""`satchel run` on one prompt, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from satchel.runtime.cli import main as cli

Capture = pytest.CaptureFixture[str]
PROMPT = "the cat sat"


def run(tiny: Path, *arguments: object, prompt: str = PROMPT) -> int:
    return cli.main(["run", str(tiny), prompt, "--threads", "1", *map(str, arguments)])


def run_json(tiny: Path, capsys: Capture, *arguments: object, prompt: str = PROMPT) -> dict[str, Any]:
    assert run(tiny, "--json", *arguments, prompt=prompt) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    document: dict[str, Any] = json.loads(out)
    return document
