"""An export that is stopped, by a signal or by a failing disk, leaves nothing behind: no bundle, no hidden folder."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.export_command import SATCHEL

SAMPLES = Path(__file__).parents[2] / "samples"
PATIENCE = 60.0  # seconds
LIMIT = 100_000
"""Bytes of the largest file that a disk takes."""


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
        ("tracing", signal.SIGTERM),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("tracing", signal.SIGINT), ("writing", signal.SIGINT), ("writing", signal.SIGTERM),
        )),
    ],
)  # fmt: skip
def test_a_signal_ends_an_export_with_nothing_left(
    sent: signal.Signals, stage: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """`test_run_checkpoint.py` has a quick test of one that is stopped while it writes."""
    log, place = tmp_path / "log", tmp_path / "out"
    checkpoint = request.getfixturevalue("large" if stage == "writing" else "tiny_checkpoint")
    command = [*SATCHEL, "export", str(checkpoint), "-o", str(place / "bundle"), "-p", "fp32"]
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


@pytest.fixture
def short_files() -> Iterator[None]:
    """No file may grow larger than `LIMIT`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("tiny_bundle", "short_files")
def test_a_disk_that_fails_while_writing_leaves_nothing(refused: Callable[..., None], tiny_checkpoint: Path) -> None:
    assert (tiny_checkpoint / "model.safetensors").stat().st_size > LIMIT
    refused(tiny_checkpoint, "--no-certificate", says=("cannot be written (File too large): free space",))
