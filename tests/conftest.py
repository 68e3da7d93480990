"""What holds for all tests: one thread for each worker, no home directory, and bundles that are made once for all."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from support.command import Satchel

from satchel.runtime.kernels.library import instruction_set, reason

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: a worker has one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """A shell that starts the tests in the background lets their children ignore Ctrl-C, which some tests send.

    The runner keeps hashes, bundles and trials of kernels in the cache of the user otherwise.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cache = tempfile.TemporaryDirectory(prefix="satchel-cache-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    os.environ["XDG_CACHE_HOME"] = cache.name
    os.environ["SATCHEL_SPECIALIZE"] = "off"  # no process works on after a test


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("own_kernels") and (why := reason()):
        pytest.skip(f"satchel's own operators {why}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which kernels the tests ran, and why others did not."""
    reports = {
        outcome: sum("own_kernels" in report.keywords for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "skipped")
    }
    ran, skipped = reports["passed"] + reports["failed"], reports["skipped"]
    if ran or skipped:
        terminalreporter.write_line(
            f"satchel's own operators ({instruction_set()}): {ran} tests ran"
            + (f"; {skipped} were skipped: they {reason()}" if skipped else "")
        )


@pytest.fixture
def satchel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Satchel:
    """`satchel` in the test's own process."""
    return Satchel(capsys, monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def _no_process_changes() -> Iterator[None]:
    """A command that runs inside the test process must not change the heap of all tests after it.

    Tests of the pool itself, and of whole commands, run in processes of their own, as users' commands do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("satchel.runtime.ort.session.prepare_process", lambda threads=None: None)
        yield
