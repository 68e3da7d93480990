"""Brings what the last stage of a model computes to the first rank, which goes on with other work until it needs it."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from satchel.runtime.execution.state import Logits

MOST_SENT = 8
"""Results on their way to the first rank, which takes them when it is between two runs; the last stage goes on."""


@dataclass
class _Awaited:
    """A result on its way: where it is received, and where it goes."""

    request: Any
    buffer: Logits
    target: Logits


class Results:
    """The results of runs, in the order of the runs. With one stage there is nothing to do."""

    def __init__(self, comm: Any, last: int) -> None:
        """`comm` has all ranks; `last` is the one whose graphs give results, the first one where there is one stage."""
        self._comm, self._last = comm, last
        self._sends = last > 0 and comm.Get_rank() == last
        self._awaited: deque[_Awaited] = deque()
        self._sent: deque[tuple[Any, Logits]] = deque()
        self._lock = threading.RLock()

    def send(self, found: Logits) -> None:
        """Send the result of a run to the first rank, if it is this one that has it."""
        if not self._sends:
            return
        while self._sent and (self._sent[0][0].Test() or len(self._sent) == MOST_SENT):
            wait(self._sent.popleft()[0])
        copied = found.copy()
        self._sent.append((self._comm.Isend(copied, 0), copied))

    def expect(self, target: Logits) -> None:
        """Receive the result of the next run, for the first rank; `settle` puts it into `target`."""
        if not self._last:
            return
        with self._lock:
            buffer = np.empty(target.shape, np.float32)
            self._awaited.append(_Awaited(self._comm.Irecv(buffer, self._last), buffer, target))

    def settle(self, target: Logits) -> None:
        """Wait until every result that was expected in a part of `target` is there."""
        if not self._awaited:
            return
        with self._lock:
            while any(np.may_share_memory(each.target, target) for each in self._awaited):
                first = self._awaited.popleft()
                wait(first.request)
                first.target[...] = first.buffer


def wait(request: Any) -> None:
    """Wait until a request of MPI is complete, and leave the core to others if that takes long."""
    start = time.monotonic()
    while not request.Test():
        waited = time.monotonic() - start
        time.sleep(0 if waited < 0.002 else 0.00005 if waited < 0.5 else 0.002)
