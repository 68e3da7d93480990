"""Reads the weights of a calibrated run before they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor, Future

import numpy as np
from numpy.typing import NDArray

from satchel.graphs.ir.arrays import transposed
from satchel.graphs.ir.weights import LazyWeight

LARGEST = 64 << 20
"""Max bytes of a weight that is read ahead: it is in memory beside the one in use."""


class ReadAhead:
    """Reads weights [inputs, outputs] as [outputs, inputs], each in a thread while the one before it is in use.

    Args:
        weights: The weights, in the order in which they will be taken; some may be left out.
        thread: What reads them.
    """

    def __init__(self, weights: Iterable[LazyWeight], thread: Executor) -> None:
        self._weights = iter(weights)
        self._thread = thread
        self._name: str | None = None
        self._found: Future[NDArray[np.float32]] | None = None
        self._begin()

    def take(self, lazy: LazyWeight) -> NDArray[np.float32]:
        """The weight, [outputs, inputs], its reading begun long ago if it is the next; the one after it is begun."""
        while self._name not in (None, lazy.name):  # was rounded before, by an export that was interrupted
            self._begin()
        early = self._found
        self._begin()
        return _read(lazy) if early is None else early.result()

    def _begin(self) -> None:
        lazy = next(self._weights, None)
        small = lazy is not None and lazy.nbytes <= LARGEST
        self._name = None if lazy is None else lazy.name
        self._found = self._thread.submit(_read, lazy) if lazy is not None and small else None


def _read(lazy: LazyWeight) -> NDArray[np.float32]:
    return transposed(lazy.numpy())
