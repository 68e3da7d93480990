"""Measures the arithmetic of a processor: run as a module, it multiplies matrices and prints JSON."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from satchel.runtime.errors import SatchelError
from satchel.runtime.kernels import library
from satchel.runtime.ort.session import default_threads
from satchel.runtime.util.child import python_path

SIZE, ROUNDS = 1024, 8


@dataclasses.dataclass(frozen=True)
class Compute:
    """Operations per second on all cores: of float32 matrix products, and of satchel's linear layers with int8
    weights and the rows of a prompt; None where satchel's kernels do not run."""

    floats: float
    int8: float | None


def measure() -> Compute:
    """Measure this process's processors, which takes a second."""
    return Compute(_floats(), _int8())


def _floats() -> float:
    """The fastest of some matrix products, on the threads that numpy takes."""
    a = np.random.default_rng(0).random((SIZE, SIZE), np.float32)
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        np.dot(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best


def _int8() -> float | None:
    """The sum of what all threads reach at the same time."""
    path = library.library()
    if path is None:
        return None
    rate = ctypes.CDLL(str(path)).satchel_products_per_second
    rate.restype = ctypes.c_double
    threads = default_threads()
    with ThreadPoolExecutor(threads) as pool:
        return sum(each.result() for each in [pool.submit(rate) for _ in range(threads)]) or None


def measure_in_child() -> Compute:
    """Measure in a new process, so that its threads end with it. Raises SatchelError if that fails."""
    command = [sys.executable, "-P", "-m", "satchel.runtime.tools.bench.compute"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        return Compute(**json.loads(done.stdout))
    except (ValueError, TypeError):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SatchelError(f"the processor's arithmetic could not be measured: {reason}") from None


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measure())))
