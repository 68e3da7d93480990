"""Child processes: what they import, and how Ctrl-C reaches them, on POSIX and on Windows. Standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

_GROUP: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
_HIDDEN: int = getattr(subprocess, "CREATE_NO_WINDOW", 0)
_IDLE: int = getattr(subprocess, "IDLE_PRIORITY_CLASS", 0)

APART: dict[str, Any] = {"start_new_session": True, "creationflags": _GROUP}
"""Arguments of subprocess.Popen for a child that Ctrl-C in the terminal does not reach.

The flags are 0 on POSIX, and Windows ignores the session.
"""

HIDDEN: dict[str, Any] = {"start_new_session": True, "creationflags": _GROUP | _HIDDEN}
"""As `APART`, for a child that has nothing to do with the terminal, and goes on when that is closed."""

IDLE: dict[str, Any] = {"start_new_session": True, "creationflags": _GROUP | _HIDDEN | _IDLE}
"""As `HIDDEN`; on Windows it gives way to other processes."""

_INTERRUPT: int = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)
"""What ends a child in a group of its own: Windows does not deliver Ctrl-C there."""

_PATIENCE = 0.5 if sys.platform == "win32" else None
"""Seconds of one wait. Ctrl-C does not end a wait on Windows, and everywhere else it does."""


def python_path() -> str:
    """A value of PYTHONPATH with which a child finds the packages that this process finds, in a packed bundle too.

    The current folder is left out: start the child with `-P`.
    """
    return os.pathsep.join(os.path.abspath(path) for path in sys.path if path)


def wait_for(child: subprocess.Popen[Any]) -> int:
    """Wait for a child of `APART`, and pass Ctrl-C on to it. Returns its exit code, that of a signal as shells do."""
    while True:
        try:
            code = child.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:
            child.send_signal(_INTERRUPT)
            code = child.wait()
        return code if code >= 0 else 128 - code
