"""An export that is stopped, by a signal or by a failing disk, leaves nothing behind: no bundle, no hidden folder."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.export_command import SATCHEL

SAMPLES = Path(__file__).parents[2] / "samples"
PATIENCE = 60.0  # seconds


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights take about a second to write."""
    folder = tmp_path_factory.mktemp("checkpoints") / "large"
    size = ("--layers", "1", "--hidden", "1024", "--vocabulary", "50000")
    subprocess.run([sys.executable, str(SAMPLES / "make_llama_1b.py"), str(folder), *size], check=True, timeout=120)
    return folder


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the export never came so far"
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("stage", "sent"),
    [
        ("tracing", signal.SIGTERM), ("writing", signal.SIGINT),
        pytest.param("tracing", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("writing", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_signal_ends_an_export_with_nothing_left(
    sent: signal.Signals, stage: str, large: Path, tmp_path: Path
) -> None:
    log, place = tmp_path / "log", tmp_path / "out"
    command = [*SATCHEL, "export", str(large), "-o", str(place / "bundle"), "-p", "fp32"]
    with log.open("w") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
        if stage == "tracing":
            wait_for(lambda: "tracing the model" in log.read_text())
        else:
            wait_for(lambda: any(path.stat().st_size for path in place.glob(".bundle.partial-*/weights.bin")))
        process.send_signal(sent)
        out, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, b"")
    assert log.read_text().endswith("\nsatchel: interrupted\n")
    assert "Traceback" not in log.read_text()
    assert not place.exists() or list(place.iterdir()) == []


def test_a_disk_that_fails_while_writing_leaves_nothing(large: Path, tmp_path: Path) -> None:
    command = [*SATCHEL, "export", str(large), "-o", str(tmp_path / "bundle"), "-p", "fp32", "--quiet"]
    limit = 50 << 20  # bytes: no file may grow larger
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("satchel: error: ")
    assert done.stderr.count("\n") == 1
    assert "cannot be written (File too large): free space" in done.stderr
    assert list(tmp_path.iterdir()) == []
