"""normalize_lookups: rows looked up with one index each are looked up with Gather."""

from __future__ import annotations

import numpy as np
import pytest
from support.graphs import build, fired, normal, operators, untouched

from satchel.graphs.passes.normalize.normalize_lookups import normalize_lookups

TABLE = normal(1, 11, 7)
INDEX = {"index": np.asarray([[3, 0, 10], [7, -1, 1]])}
TEXT = """(int64[batch,sequence] index) => (float[batch,sequence,7] y)
<int64[1] last = {-1}> {
    spread = Unsqueeze(index, last) row = GatherND <batch_dims=0> (table, spread) y = Neg(row)
}"""


@pytest.mark.parametrize("axis", ["-1", "2"])
def test_a_row_looked_up_by_one_index_is_gathered(axis: str) -> None:
    model = build(TEXT.replace("{-1}", f"{{{axis}}}"), table=TABLE)
    assert operators(fired(normalize_lookups, model, 1, feeds=INDEX).model) == {"Gather": 1, "Neg": 1}


def test_a_look_up_by_two_indices_is_left_alone() -> None:
    text = TEXT.replace(
        "spread = Unsqueeze(index, last)", "one = Unsqueeze(index, last) spread = Concat <axis=-1> (one, one)"
    )
    assert untouched(normalize_lookups, build(text, table=normal(2, 11, 11, 7))) == []


def test_an_index_spread_along_another_axis_is_left_alone() -> None:
    assert untouched(normalize_lookups, build(TEXT.replace("{-1}", "{1}"), table=TABLE)) == []


def test_batch_dimensions_are_refused() -> None:
    text = TEXT.replace("batch_dims=0", "batch_dims=1").replace("float[batch,sequence,7] y", "float[n,7] y")
    (reason,) = untouched(normalize_lookups, build(text, table=TABLE))
    assert "batch dimensions of its own" in reason
