"""Rounded weights on disk: several may be written at a time, and all are found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from satchel.export.quantize.kept import RoundedWeights
from satchel.graphs.quant.recipe import Scheme
from satchel.graphs.quant.rounding import Grid

SCHEME = Scheme(8, None, True)


def test_weights_that_are_written_at_a_time_keep_their_own_values(tmp_path: Path) -> None:
    kept = RoundedWeights(tmp_path)
    grid = Grid(SCHEME, np.ones((2, 1), np.float32), None)
    first, second = kept.values((2, 3), np.int8), kept.values((2, 3), np.int8)
    first[:], second[:] = 1, 2
    assert (kept.add("second", grid, second).codes == 2).all()
    assert (kept.add("first", grid, first).codes == 1).all()
    again = RoundedWeights(tmp_path)  # as an export that goes on
    third = again.values((2, 3), np.int8)
    third[:] = 3
    assert (again.add("third", grid, third).codes == 3).all()
    for number, name in enumerate(("first", "second", "third"), 1):
        found = again.get(name, SCHEME, 3)
        assert found is not None
        assert (found.codes == number).all()
