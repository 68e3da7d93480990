"""The first start specializes a bundle in a process of its own, unless something speaks against it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.specialized import files
from support.tiny_bundle import write_bundle

from satchel.runtime.bundle.lock import locked
from satchel.runtime.generation.generator import Generator
from satchel.runtime.optimize import worker
from satchel.runtime.ort import background, machine
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.pack import pack
from satchel.runtime.util.child import python_path

PATIENCE = 120


@pytest.fixture(autouse=True)
def _automatic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SATCHEL_SPECIALIZE", "auto")
    monkeypatch.setattr(background, "_on_battery", lambda: False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been started."""
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: object) -> None:
            commands.append(command)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    return commands


def wait_until_ready(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while open_bundle(path).specialized is None:
        assert time.monotonic() < deadline, machine.attempts(open_bundle(path))
        time.sleep(0.2)


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_first_run_makes_the_next_one_fast(is_packed: bool, folder: Path, tmp_path: Path) -> None:
    path = folder
    if is_packed:
        path = tmp_path / "bundle.pyz"
        pack(open_bundle(folder), path)
    command = [sys.executable, "-P", "-m", "satchel.runtime.cli.main", "run", str(path), "cat", "--max-new-tokens", "2"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "in the background" in first.stderr
    wait_until_ready(path)
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "in the background" not in second.stderr
    assert second.stdout == first.stdout
    assert machine.attempts(open_bundle(path)) == (0, "")
    assert not list(folder.glob(".specialize-*"))


def test_no_process_where_it_is_not_wanted(
    folder: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    Generator.open(folder, threads=1, specialize=False)
    monkeypatch.setenv("SATCHEL_SPECIALIZE", "off")
    Generator.open(folder, threads=1)
    monkeypatch.delenv("SATCHEL_SPECIALIZE")
    monkeypatch.setenv("CI", "true")
    Generator.open(folder, threads=1)
    assert not started
    monkeypatch.delenv("CI")
    Generator.open(folder, threads=1)
    assert len(started) == 1


def test_one_process_for_each_bundle_and_not_for_ever(folder: Path, started: list[list[str]]) -> None:
    with locked(folder):
        Generator.open(folder, threads=1)
    assert not started
    for _ in range(background.MAX_ATTEMPTS + 2):
        Generator.open(folder, threads=1)
    assert len(started) == background.MAX_ATTEMPTS


@pytest.mark.parametrize("obstacle", ["_on_battery", "system_memory"])
def test_what_speaks_against_it_is_said_with_the_command(
    obstacle: str,
    folder: Path,
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(background, obstacle, lambda: True if obstacle == "_on_battery" else (1, 1))
    Generator.open(folder, threads=1, progress=True)
    assert not started
    assert f"satchel specialize {folder}" in capsys.readouterr().err
    Generator.open(folder, threads=1)
    assert capsys.readouterr().err == ""


def test_a_known_failure_is_said_and_not_tried_again(
    folder: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    machine.note_attempts(open_bundle(folder), background.MAX_ATTEMPTS - 1, "the disk is full")
    Generator.open(folder, threads=1, progress=True)
    assert "the disk is full" in capsys.readouterr().err
    Generator.open(folder, threads=1, progress=True)
    assert capsys.readouterr().err == "", "not for ever"
    assert not started


def test_a_worker_notes_why_it_failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("alarm", "signal"):
        monkeypatch.setattr(worker.signal, name, lambda *_: None)
    monkeypatch.setattr(worker, "_give_way", lambda: None)
    monkeypatch.setattr("satchel.runtime.optimize.specialize._check_space", _full)
    before = files(folder)
    bundle = open_bundle(folder)
    machine.note_attempts(bundle, 2)
    assert worker.main([str(folder), "1"]) == 1
    assert machine.attempts(bundle) == (2, "the disk is full")
    assert files(folder) == before
    with locked(folder):
        assert worker.main([str(folder), "1"]) == 0


def _full(*_: object) -> None:
    from satchel.runtime.errors import SatchelError

    raise SatchelError("the disk is full")
