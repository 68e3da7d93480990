"""Times decoding beside a process that keeps a core busy, in turns with a quiet machine.

    python samples/busy_core.py BUNDLE [--threads 2] [--rounds 8]

The busy process is stopped and continued (SIGSTOP, SIGCONT: not on Windows), so that both speeds are of the same
second. Printed are the medians in tokens per second, and the median of the ratios with the speeds before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

import numpy as np

from satchel.runtime import Engine, open_bundle
from satchel.runtime.execution.state import State

PROMPT = 100  # tokens
QUIET, BUSY, SETTLING = 0.35, 0.6, 0.15  # seconds


def speed(state: State, seconds: float) -> float:
    """Tokens per second, each after the same prompt."""
    steps, begun = 0, time.perf_counter()
    while time.perf_counter() < begun + seconds:
        state.cache.shorten(PROMPT)
        state.decode(5)
        steps += 1
    return steps / (time.perf_counter() - begun)


@contextlib.contextmanager
def busy_process() -> Iterator[int]:
    """The number of a process that computes without end, stopped at first."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()

    engine = Engine.open(open_bundle(args.bundle), threads=args.threads)
    state = engine.new_state(PROMPT + 1)
    engine.prefill(state, np.random.default_rng(0).integers(100, engine.bundle.manifest.model.vocab_size, PROMPT))
    quiet, busy = [speed(state, QUIET)], []
    with busy_process() as number:
        for _ in range(args.rounds):
            os.kill(number, signal.SIGCONT)
            speed(state, SETTLING)
            busy.append(speed(state, BUSY))
            os.kill(number, signal.SIGSTOP)
            speed(state, SETTLING)
            quiet.append(speed(state, QUIET))
    ratios = [2 * each / (before + after) for each, before, after in zip(busy, quiet, quiet[1:], strict=False)]
    print(
        f"quiet {median(quiet):.0f}, busy {median(busy):.0f} tokens/s, ratio {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
