"""The inputs of static graphs: arrays of fixed shapes, filled for each run.

Positions count from 0. A run takes `count` new tokens from position `start` on; the remaining rows of a
longer graph are padding. They write nothing, and attend to position 0 so that their softmax is defined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.contract import CACHE_INDEX, CACHE_ROWS, INPUT_IDS
from satchel.runtime.bundle.graph_specs import StaticGraphs, TableSpec
from satchel.runtime.bundle.reader import Bundle

HIDDEN = -30_000.0
"""Added to a score, it makes its softmax weight 0; finite in float16."""

Array = NDArray[Any]


class StaticInputs:
    """Fills the inputs of static graphs by their names."""

    def __init__(self, bundle: Bundle, static: StaticGraphs) -> None:
        """Map the tables' files."""
        self._masks = static.masks
        self._capacity = static.capacity
        self._tables = {table.input: _mapped(bundle, table) for table in static.tables}

    def fill(self, arrays: Mapping[str, Array], tokens: Array, start: int, *, long: bool = False) -> None:
        """Write the inputs of a run of `tokens` [count] from position `start` on into `arrays`, by name.

        `long` takes the second block of tables that have two, for a text beyond `model.rotary_border`.
        """
        count = len(tokens)
        for name, array in arrays.items():
            if name == INPUT_IDS:
                array[0, :count], array[0, count:] = tokens, 0
            elif name in self._masks:
                fill_mask(array, count, start, self._masks[name])
            elif name in self._tables:
                table = self._tables[name]
                first = start + (len(table) - self._capacity if long else 0)
                rows = table[first : first + count]
                array[0, :count], array[0, count:] = rows, rows[0]
            elif name == CACHE_ROWS:
                array[...] = False
                array[0, 0, start : start + count, 0] = True
            elif name == CACHE_INDEX:
                array[...] = 0
                array[start : start + count] = np.arange(count)
            else:  # last_token, the only other one that a manifest may have
                array[0] = count - 1


def fill_mask(mask: Array, count: int, start: int, window: int) -> None:
    """Write an additive mask [1, 1, tokens, positions]: 0 where a token sees a position, `HIDDEN` elsewhere.

    The token at position p sees those from max(0, p - window + 1) to p, with a window of 0 all from 0 on.
    """
    mask[...] = HIDDEN
    for row in range(count):
        position = start + row
        first = max(0, position - window + 1) if window else 0
        mask[0, 0, row, first : position + 1] = 0
    mask[0, 0, count:, 0] = 0


def _mapped(bundle: Bundle, table: TableSpec) -> Array:
    dtype = np.dtype(table.dtype).newbyteorder("<")
    span = bundle.span(table.file)
    return np.memmap(span.path, dtype, "r", span.offset + table.offset, table.shape)
