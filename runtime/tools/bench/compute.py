"""Measures the arithmetic of a processor: run as a module, it multiplies float32 matrices and prints JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np

from satchel.runtime.errors import SatchelError
from satchel.runtime.util.child import python_path

SIZE, ROUNDS = 1024, 8


def measure() -> float:
    """Floating-point operations per second of the fastest of some matrix products, on the threads that numpy takes."""
    a = np.random.default_rng(0).random((SIZE, SIZE), np.float32)
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        np.dot(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best


def measure_in_child() -> float:
    """Measure in a new process, so that its threads end with it. Raises SatchelError if that fails."""
    command = [sys.executable, "-P", "-m", "satchel.runtime.tools.bench.compute"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        return float(json.loads(done.stdout)["flops"])
    except (ValueError, TypeError, KeyError):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SatchelError(f"the processor's arithmetic could not be measured: {reason}") from None


if __name__ == "__main__":
    print(json.dumps({"flops": measure()}))
