"""Ctrl-C at any moment of a command ends it with exit code 130 and one line, and never with a traceback.

Python's own handler raises KeyboardInterrupt wherever the program is. In the middle of an import or of cleaning up,
that turns into another error (ImportError, BufferError), or is printed and lost. The handler here therefore records
that it was called: any error that then reaches the top level is the interrupt. A second Ctrl-C ends the process
at once. Standard library only, and little of it: this is imported before anything else.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

EXIT_INTERRUPTED = 130
MESSAGE = "satchel: interrupted\n"
INTERRUPTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGBREAK") if hasattr(signal, name))
"""SIGBREAK is of Windows: Ctrl-Break, or the end of the console."""

IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
AGAIN: int = getattr(signal, "SIGALRM", signal.SIGTERM)
"""The signal with which an interrupt is raised again. Windows has no alarms, and delivers no SIGTERM either."""

AGAIN_AFTER = 0.01  # seconds; an error raised inside the hook would be lost again

_came = False
_handled: set[int] = set()


def guarded(command: Callable[[], int]) -> int:
    """Run a command in a process that belongs to satchel. Returns its exit code, 130 after Ctrl-C.

    Installs a handler for SIGINT, unless the parent process ignores it, and hooks for uncaught errors.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handle(*INTERRUPTS)
    sys.excepthook = _at_top
    sys.unraisablehook = _unraisable
    threading.excepthook = _in_thread
    try:
        code = command()
    except SystemExit:
        _ignore_from_now_on()
        raise
    _ignore_from_now_on()  # the command is done: shutdown is not interrupted
    return code


def handle(*numbers: int) -> None:
    """Treat these signals as Ctrl-C from now on, in a command that runs `guarded`."""
    for number in numbers:
        signal.signal(number, _interrupt)
    _handled.update(numbers)


def came() -> bool:
    """Whether Ctrl-C was pressed, or a signal came that counts as one, since the start or the last `forget`."""
    return _came


def forget() -> None:
    """Continue after a Ctrl-C that ended only part of the work, such as an answer in a chat."""
    global _came
    _came = False


def end() -> NoReturn:
    """End the process after Ctrl-C: flush standard output and error, and wait for nothing else."""
    _ignore_from_now_on()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(EXIT_INTERRUPTED)


def _ignore_from_now_on() -> None:
    for number in {*INTERRUPTS, *_handled, AGAIN}:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; during an import only after it, since C++ code that runs then may end the process."""
    global _came
    if _came and number != AGAIN:
        _say()
        os._exit(EXIT_INTERRUPTED)
    _came = True
    if not _is_importing(frame):
        raise KeyboardInterrupt
    _call_again()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False


def _call_again() -> None:
    """Have `_interrupt` called again soon."""
    signal.signal(AGAIN, _interrupt)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER)
    else:
        again = threading.Timer(AGAIN_AFTER, _thread.interrupt_main, (AGAIN,))
        again.daemon = True
        again.start()


def _say() -> None:
    with contextlib.suppress(OSError):
        os.write(2, MESSAGE.encode("ascii"))


def _at_top(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if _came:
        _say()
        end()
    sys.__excepthook__(kind, error, trace)


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Raise an interrupt again that was lost in a callback or a finalizer; print nothing else after Ctrl-C."""
    global _came
    if not _came:
        sys.__unraisablehook__(unraisable)
    elif issubclass(unraisable.exc_type, KeyboardInterrupt):
        _came = False
        _call_again()


def _in_thread(args: threading.ExceptHookArgs) -> None:
    if not _came:
        threading.__excepthook__(args)
