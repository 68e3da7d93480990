"""advance_last_token: the last token is taken ahead of linear layers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support.graphs import expose, fired, normal, operators, untouched
from support.native_graphs import codes_of, same_by_reference, with_linears

from satchel.graphs.analysis.linear import ROW_OFFSETS, linears, set_input
from satchel.graphs.ir.values import INTERNAL, nodes
from satchel.graphs.passes.native.advance_last_token import advance_last_token
from satchel.graphs.passes.native.fold_residuals import fold_residuals

TEXT = """(float[batch,n,40] a, float[batch,n,64] x, int64[batch,1] lengths, int32[m] row_offsets)
    => (float[batch,1,64] y) <float[batch,1,64] taken> {
    s = Tanh(x)
    p = MatMul(a, "o.weight.T")
    h = Add(p, s)
    q = RMSNormalization<axis = -1>(h, gain)
    u = MatMul(q, "up.weight.T")
    v = Tanh(u)
    d = MatMul(u, "down.weight.T")
    e = Add(d, h)
    taken = satchel.LastToken(e, lengths, row_offsets)
    y = Tanh(taken)
}"""
WEIGHTS = [codes_of("o.weight.T", 40, 64), codes_of("up.weight.T", 64, 96), codes_of("down.weight.T", 96, 64)]
FLOATS = {"gain": np.abs(normal(3, 64)), "lora_a": normal(4, 96, 4), "lora_b": normal(5, 4, 64)}
FEEDS = {
    "a": normal(1, 2, 5, 40), "x": normal(2, 2, 5, 64), "lengths": np.array([[4], [9]]),
    "row_offsets": np.zeros(0, np.int32),
}  # fmt: skip


def graph(*changes: tuple[str, str]) -> ir.Model:
    """The graph of TEXT, whose linear layers add residuals and read row_offsets."""
    text = TEXT.replace("v = Tanh(u)", "")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    weights = [weight for weight in WEIGHTS if weight.name in text]
    floats = {name: array for name, array in FLOATS.items() if name in text}
    model = fold_residuals(with_linears(text, *weights, **floats)).model
    (offsets,) = [value for value in model.graph.inputs if value.name == "row_offsets"]
    for node in linears(model):
        set_input(node, ROW_OFFSETS, offsets)
    return model


def taken(model: ir.Model) -> list[ir.Value | None]:
    """What the last token is taken of."""
    return [node.inputs[0] for node in nodes(model, "LastToken", INTERNAL)]


def test_it_goes_ahead_of_all_linear_layers_and_norms_that_only_it_reads() -> None:
    before = graph()
    after = fired(advance_last_token, before, 1).model
    assert operators(after) == {"satchel::Linear": 3, "satchel::LastToken": 2, "RMSNormalization": 1, "Tanh": 2}
    assert {value.name for value in taken(after) if value is not None} == {"a", "s"}
    assert all(len(node.inputs) <= ROW_OFFSETS for node in linears(after))
    same_by_reference(before, after, FEEDS)


def test_what_adapters_add_goes_along() -> None:
    added = 'r = MatMul(u, lora_a) t = MatMul(r, lora_b) c = MatMul(u, "down.weight.T") d = Add(c, t)'
    before = graph(('d = MatMul(u, "down.weight.T")', added))
    after = fired(advance_last_token, before, 1).model
    assert {value.name for value in taken(after) if value is not None} == {"a", "s"}
    same_by_reference(before, after, FEEDS)


def test_rows_of_several_sequences() -> None:
    feeds = {"a": normal(1, 1, 6, 40), "x": normal(2, 1, 6, 64), "lengths": np.array([[3], [9], [2]])}
    feeds["row_offsets"] = np.array([0, 3, 4, 6], np.int32)
    before = graph()
    same_by_reference(before, fired(advance_last_token, before, 1).model, feeds)


def test_what_something_else_reads_is_left_where_it_is() -> None:
    (whole,) = taken(graph())
    assert untouched(advance_last_token, expose(graph(), str(whole and whole.name))) == []
    up = str(next(node for node in linears(graph()) if node.attributes.get_int("outputs", 0) == 96).outputs[0].name)
    half = fired(advance_last_token, expose(graph(), up), 1).model
    assert up in {value.name for value in taken(half) if value is not None}


def test_rows_of_a_table_and_operators_over_tokens_are_left_where_they_are() -> None:
    assert untouched(advance_last_token, graph(("e = Add(d, h)", "e = Softmax<axis = 1>(d)"))) == []
    wide = graph(("float[batch,n,64] x", "float[1,64] x"))  # one row for all tokens
    found = fired(advance_last_token, wide, 1).model
    assert all(value is not None and value.shape is not None and len(value.shape) == 3 for value in taken(found))


def test_a_row_for_all_tokens_is_not_taken_for_one_of_each() -> None:
    """It broadcasts over the tokens."""
    one = graph(("s = Tanh(x)", "s = Tanh(x)"), ("float[batch,n,64] x", "float[batch,1,64] x"))
    found = fired(advance_last_token, one, 1).model
    assert "s" not in {value.name for value in taken(found) if value is not None}


def test_without_a_linear_layer_nothing_is_moved() -> None:
    assert untouched(advance_last_token, graph(("e = Add(d, h)", "w = Tanh(d) e = Add(w, s)"))) == []
