"""`run` and `chat` take a checkpoint: it is exported once, into the user's cache."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command import Satchel

from satchel.runtime.util import requirements
from satchel.runtime.util.child import python_path

PATIENCE = 120


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "satchel" / "bundles"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny checkpoint")


@pytest.mark.slow
def test_a_checkpoint_is_exported_once(satchel: Satchel, checkpoint: Path, cache: Path) -> None:
    command = ("run", checkpoint, "cat", "--raw", "--max-new-tokens", 2, "--threads", 1)
    first = satchel(*command)
    [bundle] = cache.iterdir()
    assert str(bundle) in first.err
    assert (bundle / "manifest.json").is_file()
    second = satchel(*command)
    assert second.out == first.out
    assert "exporting" not in second.err
    os.utime(checkpoint / "config.json", (1, 1))  # another file, for all that is known
    [weights] = checkpoint.glob("*.safetensors")
    weights.write_bytes(b"damaged")
    satchel(*command, "--quiet", code=2)
    assert list(cache.iterdir()) == [bundle]


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(checkpoint: Path, cache: Path) -> None:
    command = [sys.executable, "-P", "-m", "satchel.runtime.cli.main", "run", str(checkpoint), "cat"]
    with subprocess.Popen(command, stderr=-1, text=True, env={**os.environ, "PYTHONPATH": python_path()}) as process:
        deadline = time.monotonic() + PATIENCE
        while not list(cache.glob(".*.partial-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert not list(cache.iterdir())


@pytest.mark.parametrize("command", ["run", "chat"])
def test_without_the_extra_the_message_has_the_command(
    satchel: Satchel, command: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = [each for each in requirements.requirements() if each.extra == "export"]
    monkeypatch.setattr(requirements, "missing", lambda extra: needed)
    assert "pip install" in satchel.refuses(command, checkpoint, "cat")
