"""derive_positions: positions are counted from the attention mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, run, untouched

from satchel.graphs.passes.cache.derive_positions import derive_positions

TEXT = """(int64[batch,sequence] input_ids, int64[batch,sequence] position_ids, int64[batch,total] attention_mask)
    => (int64[batch,sequence] y, int64[batch,sequence] z) { y = Abs(position_ids) z = Add(position_ids, input_ids) }"""


def positions(mask: list[list[int]], new: int) -> np.ndarray:
    after = fired(derive_positions, build(TEXT), 1, keeps_signature=False).model
    ids = np.zeros((len(mask), new), np.int64)
    return run(after, {"input_ids": ids, "attention_mask": np.asarray(mask, np.int64)})["y"]


@pytest.mark.parametrize(
    ("mask", "new", "wanted"),
    [
        ([[1, 1, 1, 1, 1]], 5, [[0, 1, 2, 3, 4]]),
        ([[1]], 1, [[0]]),
        ([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], 5, [[0, 1, 2, 3, 4]] * 2),
        ([[1] * 13], 3, [[10, 11, 12]]),
        ([[1] * 13], 1, [[12]]),
        ([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], 1, [[1], [4]]),
        ([[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]], 1, [[2], [4]]),
    ],
    ids=[
        "prompt",
        "one token",
        "prompts padded on the right",
        "a chunk",
        "a step",
        "a step of rows of two lengths",
        "a step with a mask of the whole cache",
    ],
)
def test_positions_follow_from_the_mask(mask: list[list[int]], new: int, wanted: list[list[int]]) -> None:
    np.testing.assert_array_equal(positions(mask, new), wanted)


def inputs(model: ir.Model) -> list[str | None]:
    return [value.name for value in model.graph.inputs]


def test_positions_that_nothing_reads_go_without_a_trace() -> None:
    text = TEXT.replace("Abs(position_ids)", "Abs(input_ids)").replace("Add(position_ids", "Add(input_ids")
    after = fired(derive_positions, build(text), 1, keeps_signature=False).model
    assert inputs(after) == ["input_ids", "attention_mask"]
    assert len(after.graph) == 2


def test_a_graph_without_the_input_is_left_alone() -> None:
    text = TEXT.replace("int64[batch,sequence] position_ids, ", "").replace("position_ids", "input_ids")
    assert untouched(derive_positions, build(text)) == []
