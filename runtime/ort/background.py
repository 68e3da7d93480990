"""Specializes a bundle in a process of its own while the portable graphs already answer; the next start uses it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from satchel.runtime.bundle.lock import BusyError, locked
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import SatchelError
from satchel.runtime.ort import machine
from satchel.runtime.util.child_path import python_path
from satchel.runtime.util.memory import system_memory

SWITCH = "SATCHEL_SPECIALIZE"
"""A variable of the environment: "off" or "auto", the default; where a CI service sets CI, "off" is the default."""

WORKER = "satchel.runtime.optimize.worker"

MAX_ATTEMPTS = 3
MEMORY_FACTOR = 5
"""Memory that has to be available, of the size of the bundle's files: three engines are compared with each other."""

POWER = Path("/sys/class/power_supply")


def specialize_in_background(bundle: Bundle, threads: int | None = None) -> str | None:
    """Start to specialize an opened bundle that runs its portable graphs, in a detached process of low priority.

    Nothing happens where that is switched off, was tried `MAX_ATTEMPTS` times without success, or is under way. The
    process ends by itself, also when this one has ended before; it changes nothing until all is made and checked.

    Returns:
        A line for the user, or None where there is nothing to say.
    """
    if _is_off() or bundle.specialized is not None or bundle.manifest.graphs is None:
        return None
    if not bundle.whole or bundle.custom_ops:
        return None
    count, _ = machine.attempts(bundle)
    if count >= MAX_ATTEMPTS or _is_busy(bundle.folder):
        return None
    obstacle = _obstacle(bundle)
    if obstacle is not None or not machine.note_attempts(bundle, count + 1):
        command = f"satchel specialize {shlex.quote(str(bundle.folder))}"
        return f"{command} makes this bundle faster on this machine (not done by itself: {obstacle or 'no user cache'})"
    _start(bundle.folder.absolute(), threads)
    return (
        "optimizing this bundle for this processor in the background; the next start is faster "
        f"(--no-specialize or {SWITCH}=off switches it off)"
    )


def _is_off() -> bool:
    return os.environ.get(SWITCH, "off" if os.environ.get("CI") else "auto") != "auto"


def _is_busy(path: Path) -> bool:
    try:
        with locked(path):
            return False
    except BusyError:
        return True
    except OSError:
        return True


def _obstacle(bundle: Bundle) -> str | None:
    """Why the work would disturb, or None."""
    if _on_battery():
        return "on battery"
    needed = MEMORY_FACTOR * sum(record.bytes for record in bundle.manifest.files.values())
    try:
        available = system_memory()[1]
    except SatchelError:  # not known on this system
        return None
    if available < needed:
        return f"{needed >> 20:,} MiB of memory would be needed and {available >> 20:,} MiB are available"
    return None


def _on_battery() -> bool:
    """Whether the machine has mains power and it is not connected. Linux only; False elsewhere."""
    try:
        mains = [path for path in POWER.iterdir() if (path / "type").read_text().strip() == "Mains"]
        return bool(mains) and all((path / "online").read_text().strip() == "0" for path in mains)
    except OSError:
        return False


def _start(path: Path, threads: int | None) -> None:
    import subprocess
    import threading

    count = [] if threads is None else [str(threads)]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", WORKER, str(path), *count],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": python_path()},
        start_new_session=True,  # Ctrl-C and a closed terminal are for the parent alone
    )
    # Who lives on collects it when it ends; who ends before leaves it to the system.
    threading.Thread(target=process.wait, name="satchel-specialize", daemon=True).start()
