"""Runs a command and prints the most anonymous memory that it and its children ever held together (Linux).

    python samples/peak_memory.py satchel export out/llama-1b -o out/bundle

Anonymous memory (RssAnon in /proc) is memory that the system cannot reclaim: pages of mapped files, such as the weights
of a checkpoint or a bundle, do not count. It is read every 20 ms, so a shorter peak may be missed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

INTERVAL = 0.02  # seconds


def tree(pid: int) -> list[int]:
    """The process and all below it; those that end meanwhile are left out."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [process for child in children.read_text().split() for process in tree(int(child))]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def anonymous_kib(pid: int) -> int:
    """RssAnon of one process in KiB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def main(command: list[str]) -> int:
    """Run the command; the figure goes to standard error as its last line. Returns the command's exit code."""
    peak = 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, sum(anonymous_kib(pid) for pid in tree(process.pid)))
            time.sleep(INTERVAL)
    print(f"peak anonymous memory: {peak / 1024:.0f} MiB", file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python samples/peak_memory.py COMMAND [ARGUMENT ...]")
    sys.exit(main(sys.argv[1:]))
