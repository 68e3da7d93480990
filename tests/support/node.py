"""Runs the samples that are written in JavaScript."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NO_BROWSER = 3
"""The exit code of test/browser.mjs where no Chromium starts."""


def node(folder: Path, *arguments: object, packages: bool = True) -> subprocess.CompletedProcess[str]:
    """`node` in a sample's folder. Skips the test where it, or the sample's `packages`, are not installed."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if packages and not (folder / "node_modules").is_dir():
        pytest.skip(f"the packages of {folder.parent.name}/{folder.name} are not installed: `make test-web` does it")
    return subprocess.run(
        ["node", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON object on its last line. Skips the test where it says that no browser starts."""
    if done.returncode == NO_BROWSER:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
