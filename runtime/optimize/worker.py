"""Specializes one bundle in the background: `python -m satchel.runtime.optimize.worker BUNDLE [THREADS]`.

It runs at the lowest priority, stops after `MAX_SECONDS` at the latest, and prints nothing.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from satchel.runtime.bundle.lock import BusyError
from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.errors import SatchelError
from satchel.runtime.util import interrupt

MAX_SECONDS = 3600
LOWEST_PRIORITY = 19


def main(arguments: Sequence[str]) -> int:
    """Specialize the bundle, and record the error if that fails. Returns the exit code."""
    _give_way()
    interrupt.handle(signal.SIGTERM)  # unfinished files are removed
    limit = threading.Timer(MAX_SECONDS, _thread.interrupt_main, (signal.SIGTERM,))
    limit.daemon = True
    limit.start()

    from satchel.runtime.optimize.prepare import prepare
    from satchel.runtime.ort import machine, session

    path, threads = Path(arguments[0]), int(arguments[1]) if len(arguments) > 1 else None
    try:
        session.prepare_process(threads)
        prepare(path, threads=threads)
    except BusyError:
        return 0
    except SatchelError as error:
        with contextlib.suppress(SatchelError):
            bundle = read_bundle(path)
            machine.note_attempts(bundle, machine.attempts(bundle)[0], str(error))
        return 1
    return 0


def _give_way() -> None:
    if hasattr(os, "nice"):  # on Windows the process is started with a low priority
        with contextlib.suppress(OSError):
            os.nice(LOWEST_PRIORITY)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    sys.exit(interrupt.guarded(lambda: main(sys.argv[1:])))
