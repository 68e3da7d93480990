"""choose_rotary_rows: a text's length chooses the block of a rotary table."""

from __future__ import annotations

import numpy as np
import pytest
from support.graphs import build, fired, run, untouched

from satchel.graphs.passes.cache.choose_rotary_rows import choose_rotary_rows

TEXT = """(int64[batch,sequence] p, int64[batch,total] attention_mask)
    => (int64[batch,sequence] y, int64[batch,sequence] z) {
    a = satchel.RotaryRows<border=4>(p) y = Abs(a) b = satchel.RotaryRows<border=4>(p) z = Neg(b) }"""


@pytest.mark.parametrize(
    ("mask", "lengths", "firsts"),
    [
        ([[1, 1, 1, 1]], [[0]], [0]),
        ([[1, 1, 1, 1, 1]], [[0]], [4]),
        ([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], [[0]], [0, 4]),
        ([[1, 1]], [[5]], [4]),
        ([[1, 1]], [[4]], [0]),
        ([[1, 1], [1, 1]], [[9], [3]], [4, 0]),
    ],
    ids=["up to the border", "beyond", "rows of two lengths", "a chunk of a long text", "of a short one", "of each"],
)
def test_the_block_follows_from_the_longer_of_mask_and_text(
    mask: list[list[int]], lengths: list[list[int]], firsts: list[int]
) -> None:
    after = fired(choose_rotary_rows, build(TEXT), 2, keeps_signature=False).model
    positions = np.tile(np.arange(3), (len(mask), 1))
    ones, whole = np.asarray(mask, np.int64), np.asarray(lengths, np.int64)
    found = run(after, {"p": positions, "attention_mask": ones, "text_length": whole})
    rows = positions + np.asarray(firsts)[:, None]
    np.testing.assert_array_equal(found["y"], rows)
    np.testing.assert_array_equal(found["z"], -rows)
    assert sum(node.op_type == "Greater" for node in after.graph) == 1


def test_a_graph_with_one_block_gets_no_input() -> None:
    text = TEXT.replace("satchel.RotaryRows<border=4>", "Abs")
    assert untouched(choose_rotary_rows, build(text)) == []
