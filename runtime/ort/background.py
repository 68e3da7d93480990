"""Specializes a bundle in a process of its own while the portable graphs already answer; the next start uses it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from satchel.runtime.bundle.lock import BusyError, locked
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.ort import machine
from satchel.runtime.ort.providers import ProviderChoice
from satchel.runtime.util.child import IDLE, python_path
from satchel.runtime.util.defaults import PROVIDER
from satchel.runtime.util.memory import system_memory

SWITCH = "SATCHEL_SPECIALIZE"
"""A variable of the environment: "off" or "auto", the default; where a CI service sets CI, "off" is the default."""

WORKER = "satchel.runtime.optimize.worker"

STARTED = (
    "optimizing this bundle for this processor in the background; the next start is faster "
    f"(--no-specialize or {SWITCH}=off switches it off)"
)

MAX_ATTEMPTS = 3
MEMORY_FACTOR = 5
"""Memory that has to be available, of the size of the bundle's files: three engines are compared with each other."""

POWER = Path("/sys/class/power_supply")


def specialize_in_background(
    bundle: Bundle, provider: str | ProviderChoice, threads: int | None = None, *, shown: bool = False
) -> bool:
    """Start to specialize an opened bundle that runs its portable graphs, in a detached process of low priority.

    Nothing happens where that is switched off, was begun `MAX_ATTEMPTS` times without success, or is under way; after a
    failure whose reason is known it is not begun again. The process ends by itself, also when this one has ended
    before, and changes nothing until all is made and checked.

    Args:
        bundle: The bundle as it was opened.
        provider: The execution provider it runs on; only graphs for the CPU are specialized.
        threads: CPU threads that the bundle is to run with.
        shown: Print a line on standard error that says what was started, or why it was not and how to do it.

    Returns:
        Whether a process was started.
    """
    name = provider if isinstance(provider, str) else provider.name
    if _is_off() or bundle.specialized is not None or not bundle.digest or name != PROVIDER:
        return False
    if bundle.manifest.graphs is None or not bundle.whole or bundle.custom_ops:
        return False
    count, failure = machine.attempts(bundle)
    if count >= MAX_ATTEMPTS or _is_busy(bundle.folder):
        return False
    if failure:
        machine.note_attempts(bundle, count + 1, failure)
    obstacle = f"it failed before: {failure}" if failure else _obstacle(bundle)
    if obstacle is None:
        obstacle = _start(bundle, count, threads)
    if shown:
        command = f"satchel specialize {shlex.quote(str(bundle.folder))}"
        line = f"{command} makes this bundle faster on this machine (not done in the background: {obstacle})"
        print(f"satchel: {STARTED if obstacle is None else line}", file=sys.stderr)
    return obstacle is None


def _is_off() -> bool:
    return os.environ.get(SWITCH, "off" if os.environ.get("CI") else "auto") != "auto"


def _is_busy(path: Path) -> bool:
    try:
        with locked(path):
            return False
    except BusyError:
        return True


def _obstacle(bundle: Bundle) -> str | None:
    """Why the work would disturb, or None."""
    if _on_battery():
        return "on battery"
    needed = MEMORY_FACTOR * sum(record.bytes for record in bundle.manifest.files.values())
    available = system_memory()[1]
    if available is not None and available < needed:
        return f"{needed >> 20:,} MiB of memory would be needed and {available >> 20:,} MiB are available"
    return None


def _on_battery() -> bool:
    """Whether the machine has mains power and it is not connected. Linux only; False elsewhere."""
    try:
        mains = [path for path in POWER.iterdir() if (path / "type").read_text().strip() == "Mains"]
        return bool(mains) and all((path / "online").read_text().strip() == "0" for path in mains)
    except OSError:
        return False


def _start(bundle: Bundle, count: int, threads: int | None) -> str | None:
    """Start the process. Returns what kept it from starting, or None."""
    import subprocess
    import threading

    if not machine.note_attempts(bundle, count + 1):
        return "the user's cache cannot be written"
    path = bundle.folder.absolute()
    numbers = [] if threads is None else [str(threads)]
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER, str(path), *numbers],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=path.parent,
            env={**os.environ, "PYTHONPATH": python_path()},
            **IDLE,
        )
    except OSError as error:
        return str(error.strerror)
    # A parent that lives on collects the child when it ends; that of one that ends before is collected by the system.
    threading.Thread(target=process.wait, name="satchel-specialize", daemon=True).start()
    return None
