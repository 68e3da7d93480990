"""All stages of a cut bundle in one process: what one sends, the next one receives, without MPI."""

from __future__ import annotations

import collections
import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from satchel.runtime.bundle.ranks import rank_folder, read_ranks
from satchel.runtime.execution.engine import Engine, open_engine
from satchel.runtime.execution.ranks.wire import _Ranks
from satchel.runtime.kernels import library
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.session import SessionSettings

needs_kernels = pytest.mark.skipif(library.reason() is not None, reason=f"satchel's own kernels {library.reason()}")

_POINTER, _INT, _HANDLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t
SEND = ctypes.CFUNCTYPE(_INT, _POINTER, _INT, _HANDLE, _INT, _INT, _HANDLE, _POINTER)
TEST = ctypes.CFUNCTYPE(_INT, _POINTER, ctypes.POINTER(_INT), _POINTER)


@contextmanager
def mailbox() -> Iterator[collections.deque[bytes]]:
    """Let `Send` put messages in here and `Receive` take the first one."""
    messages: collections.deque[bytes] = collections.deque()

    def send(data: int, count: int, *_: int) -> int:
        messages.append(ctypes.string_at(data, 4 * count))
        return 0

    def receive(data: int, count: int, *_: int) -> int:
        if not messages or len(messages[0]) != 4 * count:
            return 1
        ctypes.memmove(data, messages.popleft(), 4 * count)
        return 0

    def test(request: int, done: ctypes._Pointer[ctypes.c_int], status: int) -> int:
        done[0] = 1
        return 0

    functions = SEND(send), SEND(receive), TEST(test)
    found = _Ranks()
    for name, function in zip(("MPI_Isend", "MPI_Irecv", "MPI_Test"), functions, strict=True):
        setattr(found, name, ctypes.cast(function, _POINTER).value)
    kernels = ctypes.CDLL(str(library.library()))
    kernels.satchel_join(ctypes.byref(found))
    try:
        yield messages
    finally:
        kernels.satchel_join(ctypes.byref(_Ranks()))


class Chain:
    """The stages of a bundle, one rank each, which run in turn."""

    def __init__(self, folder: Path) -> None:
        ranks = range(len(read_ranks(folder).digests))
        settings = SessionSettings(threads=1, alone=True)
        self.engines: list[Engine] = [open_engine(open_bundle(rank_folder(folder, r)), settings) for r in ranks]

    def score(self, ids: np.ndarray) -> np.ndarray:
        """As `Engine.score`."""
        return [engine.score(ids, len(ids)) for engine in self.engines][-1]

    def decode(self, ids: np.ndarray, count: int, spans: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """The logits of each of `count` greedy steps after a prompt that is fed in parts of these lengths."""
        states = [engine.new_state(len(ids) + count) for engine in self.engines]
        start, tokens, logits = 0, list[int](), list[np.ndarray]()
        for length in spans:
            for state in states:
                state.prefill(ids[start : start + length])
            start += length
        for _ in range(count):
            logits.append(states[-1].logits.copy())
            tokens.append(int(logits[-1].argmax()))
            for state in states:
                state.decode(tokens[-1])
        return np.array(logits), tokens
