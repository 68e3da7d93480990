"""hoist_position_gathers: what is looked up by position becomes an input that knows its table."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support.graphs import build, fired, normal, run, untouched

from satchel.graphs.ir.inputs import table_of
from satchel.graphs.passes.static.hoist_position_gathers import hoist_position_gathers

TABLE = normal(3, 12, 4)
TEXT = """(int64[1,3] position_ids, float[1,2,9,4] "past_key_values.0.key") => (float[1,3,4] y, float[1,2,9,4] z)
<int64 offset = {2}, float two = {2.0}> {
    rows = Gather(table, position_ids) y = Mul(rows, two) z = Mul("past_key_values.0.key", two)
}"""
MOVED = ("rows = Gather(table, position_ids)", "moved = Add(offset, position_ids) rows = Gather(table, moved)")
POSITIONS = np.asarray([[4, 5, 6]])
FEEDS = {"position_ids": POSITIONS, "past_key_values.0.key": normal(4, 1, 2, 9, 4)}


def graph(old: str = "", new: str = "") -> ir.Model:
    return build(TEXT, (old, new), table=TABLE)


def check(model: ir.Model, offset: int) -> None:
    after = fired(hoist_position_gathers, model, 1, keeps_signature=False).model
    (value,) = [v for v in after.graph.inputs if v.name == "table.rows"]
    assert value.shape == ir.Shape([1, 3, 4])
    table = table_of(value)
    assert table is not None
    assert table.dims == (9, 4), "one row for each position of the cache"
    np.testing.assert_array_equal(table.numpy(), TABLE[offset : offset + 9])
    rows = table.numpy()[POSITIONS]
    np.testing.assert_array_equal(run(after, FEEDS | {"table.rows": rows})["y"], run(model, FEEDS)["y"])


def test_a_look_up_by_position_becomes_an_input() -> None:
    check(graph(), 0)


def test_an_offset_moves_the_table() -> None:
    check(graph(*MOVED), 2)


def test_two_look_ups_in_one_table_share_an_input() -> None:
    model = graph("y = Mul(rows, two)", "again = Gather(table, position_ids) y = Add(rows, again)")
    after = fired(hoist_position_gathers, model, 2, keeps_signature=False).model
    assert [v.name for v in after.graph.inputs].count("table.rows") == 1


def test_a_table_in_half_precision_is_that_of_an_input_in_half_precision() -> None:
    (value,) = [v for v in hoist_position_gathers(graph()).model.graph.inputs if v.name == "table.rows"]
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    table = table_of(value)
    assert table is not None
    np.testing.assert_array_equal(table.numpy(), TABLE[:9].astype(np.float16))


def test_too_short_a_table_is_refused() -> None:
    text = TEXT.replace("{2}", "{4}", 1).replace(*MOVED)
    (reason,) = untouched(hoist_position_gathers, build(text, table=TABLE))
    assert reason == "the table table has 12 rows, too few for 9 positions"


def test_a_look_up_along_another_axis_is_refused() -> None:
    text = TEXT.replace("Gather(table", "Gather<axis = 1>(table").replace("float[1,3,4] y", "float[?,?,?] y")
    (reason,) = untouched(hoist_position_gathers, build(text, table=TABLE))
    assert reason == "what positions look up is not [1, tokens, width] out of [positions, width]"


def test_look_ups_by_other_values_are_left_alone() -> None:
    assert untouched(hoist_position_gathers, build(TEXT.replace("position_ids", "input_ids"), table=TABLE)) == []
