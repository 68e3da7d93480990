"""One number of threads for all that decides a bundle's bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from threadpoolctl import threadpool_limits

from satchel.runtime.util.cpu import machine_cores


@contextlib.contextmanager
def fixed_threads() -> Iterator[None]:
    """Let torch compute in one thread per core of the machine, whatever this process may use, and numpy in one.

    Sums are cut into as many parts as there are threads, and each way to cut rounds otherwise. So neither the CPUs that
    a process is bound to nor OMP_NUM_THREADS and its like may choose the number. numpy's large products are cut into
    pieces (`satchel.graphs.ir.arrays`). The old numbers come back at the end.
    """
    threads, before = machine_cores(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
