"""quantize_embeddings: a lookup and a tied head read the same codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.codes import exact_rows, rounded, values
from support.graphs import build, fired, normal, operators, run, same_numbers, tag, the, untouched

from satchel.graphs.ir.values import weight
from satchel.graphs.passes.quantize.quantize_embeddings import quantize_embeddings

VOCABULARY, HIDDEN, BLOCK = 37, 96, 32
TABLE = normal(1, VOCABULARY, HIDDEN)
TEXT = """(int64[batch,sequence] ids, float[batch,rows,96] x) => (float[batch,sequence,96] e, float[batch,rows,37] y)
    <float[batch,rows,37] p> {
    e = Gather(table, ids)
    p = com.microsoft.FusedMatMul <transB=1> (x, table)
    y = Neg(p)
}"""
LOOKUP = "(int64[n] ids) => (float[n,96] y) { e = Gather(table, ids) y = Neg(e) }"
FEEDS = {"ids": np.asarray([[0, 36, 5, -1]]), "x": exact_rows(2, BLOCK, 1, 3, HIDDEN)}


def tied(table: np.ndarray = TABLE, text: str = TEXT, *changes: tuple[str, str]) -> ir.Model:
    return build(text, *changes, table=table)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_lookup_and_head_mean_what_the_codes_stand_for(bits: int, block: int, symmetric: bool) -> None:
    codes = rounded("table", TABLE, bits, block, symmetric)
    after = fired(quantize_embeddings({"table": codes}), tied(), 1).model
    assert operators(after) == {"com.microsoft::GatherBlockQuantized": 1, "com.microsoft::MatMulNBits": 1, "Neg": 1}
    assert "table" not in after.graph.initializers
    feeds = FEEDS | {"x": exact_rows(3, block, 1, 3, HIDDEN)}
    found, wanted = run(after, feeds), run(tied(values(codes)), feeds)
    np.testing.assert_array_equal(found["e"], wanted["e"])
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=1e-5, atol=1e-3)  # sums of products of some hundreds


def test_a_head_can_take_its_input_as_it_is() -> None:
    codes = rounded("table", TABLE)
    after = fired(quantize_embeddings({"table": codes}, accuracy_level=0), tied(), 1).model
    x = normal(4, 2, 5, HIDDEN)
    wanted = -x @ values(codes).T
    error = run(after, {"ids": np.asarray([[0]]), "x": x})["y"] - wanted
    assert np.linalg.norm(error) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_exact_head_loses_nothing_of_its_input(bits: int) -> None:
    codes, feeds = rounded("table", TABLE, bits, BLOCK), {"ids": np.asarray([[0]]), "x": normal(4, 2, 5, HIDDEN)}
    wanted = -feeds["x"] @ values(codes).T
    exact, plain = (
        np.linalg.norm(
            run(fired(quantize_embeddings({"table": codes}, exact=names), tied(), 1).model, feeds)["y"] - wanted
        )
        for names in (("table",), ())
    )
    assert exact < 1e-4 * np.linalg.norm(wanted) < plain / 10


def test_a_table_without_a_head_is_looked_up() -> None:
    codes = rounded("table", TABLE, 4)
    after = fired(quantize_embeddings({"table": codes}), build(LOOKUP, table=TABLE), 1).model
    assert operators(after) == {"com.microsoft::GatherBlockQuantized": 1, "Neg": 1}
    assert sorted(after.graph.initializers) == ["table.row_scales", "table.rows4"]
    same_numbers(build(LOOKUP, table=values(codes)), after, {"ids": np.asarray([7, 0, 36])}, exact=True)


def test_the_head_reads_the_bytes_of_the_lookup() -> None:
    after = fired(quantize_embeddings({"table": rounded("table", TABLE, 4)}), tied(), 1).model
    by_row, by_block = (weight(the(after, op).inputs[i]) for op, i in (("GatherBlockQuantized", 0), ("MatMulNBits", 1)))
    assert by_row is not None and by_block is not None
    assert by_block.dims == (VOCABULARY, HIDDEN // BLOCK, BLOCK // 2)
    assert by_block.base is by_row.base
    assert by_block.tobytes() == by_row.tobytes()
    assert the(after, "GatherBlockQuantized").inputs[2] is the(after, "MatMulNBits").inputs[2]


def test_an_id_outside_the_table_gives_zeros() -> None:
    after = fired(quantize_embeddings({"table": rounded("table", TABLE)}), build(LOOKUP, table=TABLE), 1).model
    np.testing.assert_array_equal(run(after, {"ids": np.asarray([VOCABULARY, -VOCABULARY - 1])})["y"], 0)


@pytest.mark.parametrize(
    ("codes", "reason"),
    [(rounded("table", TABLE.T.copy(), block=None), "another shape"), (rounded("table", TABLE, block=None), "per row")],
    ids=["shape", "no blocks"],
)
def test_codes_that_no_operator_reads_are_refused(codes: object, reason: str) -> None:
    (found,) = untouched(quantize_embeddings({"table": codes}), tied())  # type: ignore[dict-item]
    assert reason in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("y = Neg(p)", "t = Identity(table) y = Neg(p)"), "read by"),
        (("e = Gather", "e = Gather <axis=1>"), "first axis"),
        (("transB=1", "transB=1, alpha=2.0"), "alpha"),
        (("transB=1", "transB=0"), "not transposed"),
        (("FusedMatMul <transB=1> (x, table)", "FusedMatMul <transB=1> (table, x)"), "read by"),
    ],
    ids=["another reader", "columns", "scaled", "not transposed", "first operand"],
)
def test_a_table_that_is_read_in_other_ways_is_refused(change: tuple[str, str], reason: str) -> None:
    (found,) = untouched(quantize_embeddings({"table": rounded("table", TABLE)}), tied(TABLE, TEXT, change))
    assert reason in found


def test_an_unknown_attribute_of_the_lookup_is_refused() -> None:
    (reason,) = untouched(
        quantize_embeddings({"table": rounded("table", TABLE)}), tag(tied(), "Gather", "mode", "clip")
    )
    assert "mode" in reason


def test_a_table_that_is_an_output_is_refused() -> None:
    model = tied()
    model.graph.outputs.append(model.graph.initializers["table"])
    (reason,) = untouched(quantize_embeddings({"table": rounded("table", TABLE)}), model)
    assert "output of the graph" in reason
