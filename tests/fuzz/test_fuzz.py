"""A small share of the mutants, the same each time, and that their judge can say no. `make fuzz` runs thousands."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import harness
from fuzz.trial import Trial


@pytest.mark.slow
def test_thirty_changed_bundles_are_refused_or_run() -> None:
    """In a process of its own: children are forked, and the tests' process has threads of ONNX Runtime."""
    command = [sys.executable, "-m", "fuzz", "--mutants", "30", "--seed", "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 mutants of seed 11" in done.stdout
    assert " refused" in done.stdout


@pytest.mark.parametrize(
    ("status", "said", "how"),
    [
        (0, "", "ran"),
        (1 << 8, "", "ran"),
        (2 << 8, "satchel: error: no\n", "refused"),
        (2 << 8, "", "refused without a word"),
        (2 << 8, "satchel: error: no\nTraceback (most recent call last):\n", "let an exception through"),
        (harness.ESCAPED << 8, "", "let an exception through"),
        (3 << 8, "", "exit code 3"),
        (signal.SIGSEGV, "", "died"),
        (signal.SIGKILL, "", "signal 9"),
        (signal.SIGXCPU, "", "signal 24"),
        (None, "", "hung"),
    ],
)
def test_the_judge_tells_good_endings_from_bad_ones(status: int | None, said: str, how: str) -> None:
    assert harness.judge(status, said) == how
    assert (how in harness.GOOD) is (how in ("ran", "refused", "died"))


@pytest.mark.parametrize("name", ["outside/new", "bundle/new", "outside/secret", "cwd/new"])
def test_a_file_written_outside_the_scratch_folders_is_seen(tmp_path: Path, name: str) -> None:
    for folder in ("outside", "bundle", "out", "tmp", "cache", "cwd"):
        (tmp_path / folder).mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    before = harness.snapshot(tmp_path)
    (tmp_path / "out" / "new").write_bytes(b"x")
    (tmp_path / "tmp" / "new").write_bytes(b"x")
    assert harness.snapshot(tmp_path) == before
    (tmp_path / name).write_bytes(b"changed")
    assert harness.snapshot(tmp_path) != before


def test_a_child_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SECONDS", 0.3)
    monkeypatch.setattr(harness, "_in_child", lambda trial, place: harness.time.sleep(100))
    (tmp_path / "stderr").write_text("")
    assert harness.run_child(Trial(tmp_path, ""), tmp_path) == ("hung", "")


def test_a_trial_that_raises_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(trial: Trial, place: Path) -> int:
        raise RecursionError("no message of ours")

    monkeypatch.setattr(harness, "_in_child", fail)
    (tmp_path / "stderr").write_text("")
    assert harness.run_child(Trial(tmp_path, ""), tmp_path)[0] == "let an exception through"
