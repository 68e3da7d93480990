"""cut: parts of a graph, run one after the other, give what the whole gives, and none is larger than allowed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, normal, run

from satchel.graphs.analysis.cut import CutError, cut, inline_bytes
from satchel.graphs.ir.verify import verify

LAYERS, WIDTH = 4, 8
WEIGHTS = {f"{name}{i}": normal(10 * i + len(name), WIDTH, WIDTH) for i in range(LAYERS) for name in ("up", "down")}
TABLE = normal(99, 11, WIDTH)
LAYER_BYTES, TABLE_BYTES = 2 * 4 * WIDTH * WIDTH, 4 * 11 * WIDTH
FEEDS = {"ids": np.asarray([[3, 0, 10]]), "rows": normal(5, 1, 3, WIDTH), "past": normal(6, 1, 3, WIDTH)}


def graph() -> ir.Model:
    """A residual stream through layers that all read one more value; the table is read at both ends."""
    nodes = ["h0 = Gather(table, ids)", "angles = Cos(rows)"]
    for i in range(LAYERS):
        nodes.append(f"a{i} = MatMul(h{i}, up{i}) b{i} = Mul(a{i}, angles) c{i} = Tanh(b{i})")
        nodes.append(f"d{i} = MatMul(c{i}, down{i}) h{i + 1} = Add(h{i}, d{i})")
    nodes.insert(3, "present = Add(past, c0)")
    nodes.append(f"t = Transpose<perm = [0, 2, 1]>(h{LAYERS}) logits = MatMul(table, t)")
    text = f"""(int64[1,3] ids, float[1,3,8] rows, float[1,3,8] past)
    => (float[1,11,3] logits, float[1,3,8] present) {{ {" ".join(nodes)} }}"""
    return build(text, table=TABLE, **WEIGHTS)


def run_parts(parts: list[ir.Model]) -> dict[str, np.ndarray]:
    values = dict(FEEDS)
    for part in parts:
        verify(part)
        assert all(v.uses() for v in part.graph.inputs)
        assert {str(v.name) for v in part.graph.inputs} <= set(values), "a part reads what is there before it"
        values |= run(part, values)
    return values


@pytest.mark.parametrize("room", [1, 2, 3])
def test_parts_give_what_the_whole_gives(room: int) -> None:
    model = graph()
    limit = TABLE_BYTES + room * LAYER_BYTES
    parts = cut(model, limit)
    assert len(parts) == {1: 4, 2: 2, 3: 2}[room]
    assert all(inline_bytes(part) <= limit for part in parts)
    found, whole = run_parts(parts), run(model, FEEDS)
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_cut_lies_between_layers() -> None:
    first, second = cut(graph(), TABLE_BYTES + 2 * LAYER_BYTES)
    assert [v.name for v in first.graph.outputs] == ["present", "angles", "h2"]
    assert {v.name for v in second.graph.inputs} == {"h2", "angles"}


def test_a_result_of_several_is_not_handed_on_alone() -> None:
    text = """(float[1,8] x) => (float[1,4] y) <int64[2] sizes = {4, 4}> {
        a = MatMul(x, first) low, high = Split<axis = 1>(a, sizes) b = Tanh(low) y = MatMul(b, second) }"""
    parts = cut(build(text, first=normal(1, 8, 8), second=normal(2, 4, 4)), 4 * 64 + 16)
    assert [v.name for v in parts[0].graph.outputs] == ["b"]


def test_one_operator_that_is_too_large_is_an_error() -> None:
    with pytest.raises(CutError, match="alone reads 352 bytes"):
        cut(graph(), TABLE_BYTES - 1)


def test_no_place_with_known_shapes_is_an_error() -> None:
    model = graph()
    for node in model.graph:
        if not node.outputs[0].is_graph_output():
            node.outputs[0].shape = None
    with pytest.raises(CutError, match="no place to cut where all shapes are known"):
        cut(model, TABLE_BYTES + LAYER_BYTES)
