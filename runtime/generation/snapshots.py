"""Where a prompt is cut to take snapshots of states, which later prompts with a shared prefix go on from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.execution.kv_cache import Cache
from satchel.runtime.execution.spans import PREFILL_CHUNK

NEAREST = 16  # tokens from one message to the next that are worth a run of the graph
LAST = 3  # messages at the end of a prompt; before them only the first is worth it, a system prompt


class Snapshots:
    """The lengths of a prompt at which its states are copied: message boundaries, and after each chunk.

    At most `most` copies are held. The oldest goes first, of those after chunks before those between messages.
    """

    def __init__(self, boundaries: tuple[int, ...] = (), most: int = 0) -> None:
        """`boundaries` are in ascending order; with `most` 0 nothing is cut or copied."""
        self._most = most
        self._boundaries = boundaries if most else ()

    def end(self, start: int, length: int) -> int:
        """Up to where a prompt of `length` tokens may be fed in one run that begins at `start`."""
        return next((cut for cut in self._boundaries if start < cut < length), length)

    def add_due(self, cache: Cache) -> None:
        """Copy the states if this length is one of those."""
        if cache.length in self._boundaries or cache.length >= max(cache.snapshots, default=0) + PREFILL_CHUNK:
            self.add(cache)

    def add(self, cache: Cache) -> None:
        """Copy the states, and let the copies go that are too many."""
        if not self._most:
            return
        cache.take_snapshot()
        lengths = sorted(cache.snapshots, key=lambda length: (length in self._boundaries, length))
        for length in lengths[: max(0, len(lengths) - self._most)]:
            del cache.snapshots[length]


NO_SNAPSHOTS = Snapshots()


def snapshots_of(ids: NDArray[np.int64], is_special: Callable[[int], bool], multiple: int, most: int) -> Snapshots:
    """Where at most `most` snapshots of a prompt are taken: at its `message_boundaries`, and after each chunk."""
    return Snapshots(message_boundaries(ids, is_special, multiple), most) if most else NO_SNAPSHOTS


def message_boundaries(ids: NDArray[np.int64], is_special: Callable[[int], bool], multiple: int) -> tuple[int, ...]:
    """Where messages of a prompt begin or end, as far as its special tokens tell, at multiples of `multiple`.

    They are the first one and the last few, none near the one before.
    """
    known, inverse = np.unique(ids, return_inverse=True)
    special = np.array([is_special(int(token)) for token in known])[inverse]
    found = [0]
    for start in np.flatnonzero(special[1:] & ~special[:-1]) + 1:
        if start - start % multiple - found[-1] >= NEAREST:
            found.append(int(start - start % multiple))
    first, later = found[1:2], found[2:]
    return (*first, *later[-LAST:])
