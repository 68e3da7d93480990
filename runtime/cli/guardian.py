"""Keeps a process beside each rank that says how the rank ended.

The launcher of MPI ends all other ranks, at once, when the process that it has started is gone, before any of them
could say which one was lost. So that process is the guardian: it waits for the rank, its child, and reports it first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
"""Where launchers say which rank a process is."""

GRACE = 3.0
"""Seconds that a stopped rank has until it counts as lost."""

EXIT_LOST = 2
PR_SET_PDEATHSIG = 1


def guarded(work: Callable[[], int]) -> int:
    """Do the work of a rank in a child of this process. Returns its exit code, `EXIT_LOST` where it was killed.

    Where no launcher has started this process, the work is done here.
    """
    rank = next((os.environ[name] for name in VARIABLES if name in os.environ), None)
    if rank is None or not hasattr(os, "fork"):
        return work()
    sys.stdout.flush()
    sys.stderr.flush()
    guardian, child = os.getpid(), os.fork()
    if child == 0:
        _end_with(guardian)
        return work()

    def forward(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    return _wait(child, f"rank {rank} on {socket.gethostname()} (process {child})")


def _end_with(guardian: int) -> None:
    """Let the system end this process when its guardian is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian:
        os._exit(EXIT_LOST)


def _wait(child: int, name: str) -> int:
    stopped: float | None = None
    while True:
        options = os.WUNTRACED | os.WCONTINUED | (0 if stopped is None else os.WNOHANG)
        found, status = os.waitpid(child, options)
        if found == 0:
            if stopped is not None and time.monotonic() - stopped > GRACE:
                _report(f"{name} was stopped")
                os.kill(child, signal.SIGKILL)
                return EXIT_LOST
            time.sleep(0.1)
        elif os.WIFSTOPPED(status):
            stopped = time.monotonic()
        elif os.WIFCONTINUED(status):
            stopped = None
        elif os.WIFSIGNALED(status):
            _report(f"{name} was ended by {signal.Signals(os.WTERMSIG(status)).name}")
            return EXIT_LOST
        else:
            return os.WEXITSTATUS(status)


def _report(line: str) -> None:
    os.write(sys.stderr.fileno(), f"\nsatchel: error: {line}: the run of all ranks has ended\n".encode())
