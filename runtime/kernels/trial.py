"""Tries an instruction set in a child process, and remembers what was found in the user's cache.

A processor, above all a virtual one, may announce an instruction that it does not have, and a program that runs it is
ended. The child multiplies a few small matrices (trial.c) and compares the bits with those of plain C.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from satchel.runtime.bundle.hash_cache import HashCache, file_identity
from satchel.runtime.util.child import HIDDEN
from satchel.runtime.util.cpu import processor_features, processor_name

RIGHT, WRONG, ENDED = "right", "wrong", "ended"
"""What a trial finds: the bits of plain C, other bits, or that the child was ended by what it ran."""

_CHILD = """
import ctypes, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
except ImportError:
    ctypes.windll.kernel32.SetErrorMode(0x8003)
run = ctypes.CDLL(sys.argv[1]).satchel_try_instruction_set
run.argtypes, run.restype = [ctypes.c_char_p], ctypes.c_bool
print("right" if run(sys.argv[2].encode()) else "wrong")
"""
"""Without a core dump, or a window that reports the end of a program on Windows."""

_ENDS = {-signal.SIGILL, -signal.SIGSEGV, -signal.SIGFPE, 0xC000001D, 0xC0000005}
"""Exit codes of a child that an instruction ended: signals, or Windows' illegal instruction and access violation."""

_SECONDS = 20.0


def tried(library: Path, name: str) -> str | None:
    """What a trial of the instruction set `name` of this library found on this processor; None if it could not be made.

    What is remembered holds for this file, and for this processor by its name and its features. If the cache cannot be
    read or written, it is tried again.
    """
    known, key = HashCache.load(), "\0".join(("trial", name, processor_name(), *processor_features()))
    found = known.get(library, key)
    if found not in (RIGHT, WRONG, ENDED):
        identity = file_identity(library)
        found = _run_child(library, name)
        if found is not None:
            known.put(library, identity, found, key)
            known.save()
    return found


def _run_child(library: Path, name: str) -> str | None:
    if not Path(sys.executable or "").name.lower().startswith(("python", "pypy")):
        return None  # another program that has Python inside
    command = [sys.executable, "-I", "-S", "-c", _CHILD, str(library), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS, **HIDDEN)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = done.stdout.strip()
    if done.returncode in _ENDS:
        return ENDED
    return said if done.returncode == 0 and said in (RIGHT, WRONG) else None
