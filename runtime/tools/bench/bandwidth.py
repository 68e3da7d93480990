"""Measures the memory bandwidth: run as a module, it reads a large buffer and prints JSON.

Each thread takes the max of its slice, which numpy does vectorized and without the GIL, several times; the fastest time
counts. It runs in a separate process, since the buffer would count as memory of the caller.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import SatchelError
from satchel.runtime.util.child import python_path
from satchel.runtime.util.cpu import usable_cpus
from satchel.runtime.util.memory import system_memory

ROUNDS = 8
TIMES_CACHES = 4  # size of the buffer, relative to all caches together
SMALLEST, LARGEST = 256 << 20, 2 << 30  # bytes, if memory allows
PART_OF_MEMORY = 4  # the buffer takes at most this part of the available memory
MIB = 1 << 20


@dataclass(frozen=True)
class Bandwidth:
    """`gb_per_second` (10^9 bytes) read by `threads` threads out of a buffer of `buffer_mb` MiB."""

    gb_per_second: float
    threads: int
    buffer_mb: int


def measure(threads: int, buffer_bytes: int) -> Bandwidth:
    """Read a buffer of about `buffer_bytes` with `threads` threads, in this process. Raises SatchelError."""
    if threads < 1 or buffer_bytes < threads * MIB:
        raise SatchelError(f"{threads} threads cannot share {buffer_bytes} bytes: give at least 1 thread and its MiB")
    words = buffer_bytes // threads // np.dtype(np.int64).itemsize
    with ThreadPoolExecutor(threads) as pool:
        try:
            # Each thread writes its slice first: unwritten pages would all be the same page of zeros.
            slices = list(pool.map(lambda fill: np.full(words, fill, np.int64), range(threads)))
        except MemoryError:
            raise SatchelError(f"not enough memory for a buffer of {buffer_bytes // MIB} MiB") from None
        best = min(_seconds(pool, slices) for _ in range(ROUNDS))
    total = sum(part.nbytes for part in slices)
    return Bandwidth(total / best / 1e9, threads, total // MIB)


def measure_in_child() -> Bandwidth:
    """Measure in a new process, on all CPUs that this one may use. Raises SatchelError if that fails."""
    command = [sys.executable, "-P", "-m", "satchel.runtime.tools.bench.bandwidth"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        return Bandwidth(**json.loads(done.stdout))
    except (ValueError, TypeError):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SatchelError(f"the memory bandwidth could not be measured: {reason}") from None


def buffer_size() -> int:
    """Bytes of a buffer that is much larger than the caches and leaves most of the memory free."""
    wanted = min(max(TIMES_CACHES * _cache_bytes(), SMALLEST), LARGEST)
    return min(wanted, _available_bytes() // PART_OF_MEMORY)


def _seconds(pool: ThreadPoolExecutor, slices: list[NDArray[np.int64]]) -> float:
    start = time.perf_counter()
    list(pool.map(np.max, slices))
    return time.perf_counter() - start


def _cache_bytes() -> int:
    """Size of all caches from level 2 on, each counted once; 0 where the system does not list them."""
    found = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, shared, size = (
                (index / name).read_text(encoding="ascii").strip() for name in ("level", "shared_cpu_list", "size")
            )
        except OSError:
            continue
        if level > "1" and size.endswith("K"):
            found[level, shared] = int(size[:-1]) << 10
    return sum(found.values())


def _available_bytes() -> int:
    available = system_memory()[1]
    return SMALLEST * PART_OF_MEMORY if available is None else available


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print one JSON object on one line."""
    parser = argparse.ArgumentParser(description="Measure memory bandwidth.")
    parser.prog = "python -m satchel.runtime.tools.bench.bandwidth"
    parser.add_argument("--threads", metavar="N", type=int, help="threads (default: one per logical CPU)")
    parser.add_argument("--mib", metavar="N", type=int, help="buffer in MiB (default: 4 times the caches, 256 or more)")
    args = parser.parse_args(arguments)
    size = buffer_size() if args.mib is None else args.mib * MIB
    try:
        found = measure(usable_cpus() if args.threads is None else args.threads, size)
    except SatchelError as error:
        print(f"satchel: error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(dataclasses.asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
