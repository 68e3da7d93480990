"""Each rule of the CANN provider catches a graph that breaks it and no other rule; a whole graph passes all."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.provider_graphs import ATTEND, view

from satchel.graphs.providers.findings import ERROR, WARNING, GraphView
from satchel.graphs.providers.rules import CANN

CLEAN = """decode (int64[1, 1] ids, float16[1, 1, 1, 8] mask, bool[1, 1, 8, 1] rows, float16[1, 2, 8, 4] past)
    => (float16[1, 1, 16] logits, float16[1, 2, 8, 4] present)
<float16[16, 8] embed = {0}, float16[8, 8] q = {0}, float16[8, 8] k = {0}, float[1] eps = {0.00001},
 float16[8, 16] head = {0}, int64[4] heads = {1, 1, 2, 4}, int64[3] flat = {1, 1, 8}> {
    h = Gather(embed, ids)
    wide = Cast<to = 1>(h)
    square = Mul(wide, wide)
    mean = ReduceMean<axes = [-1]>(square)
    safe = Add(mean, eps)
    root = Sqrt(safe)
    normal = Div(wide, root)
    x = Cast<to = 10>(normal)
    query = MatMul(x, q)
    key = MatMul(x, k)
    ATTEND
}""".replace("ATTEND", ATTEND.replace("WRITE", "Where(rows, kt, past)"))


def quoted(model: ir.Model, name: str) -> None:
    model.graph.inputs[0].name = name


def with_input_named(name: str) -> GraphView:
    found = view("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    quoted(found.model, name)
    return found


def of_two_gigabytes() -> GraphView:
    found = view("g (float[1, 2] x) => (float[1, 4] y) <float[2, 4] w = {0}> { y = MatMul(x, w) }")
    shape = ir.Shape([1 << 15, 1 << 14])
    big = ir.ExternalTensor("nowhere", 0, 1 << 31, ir.DataType.FLOAT, shape=shape, name="w")
    found.model.graph.initializers["w"].const_value = big
    return found


LOOP = """g (float[2] x) => (float[2] y) <int64 n = {3}, bool go = {1}> {
    y = Loop <body = step (int64 i, bool c, float[2] s) => (bool d, float[2] t) { d = Identity(c) t = Relu(s) }>
        (n, go, x)
}"""
BRANCH = """g (bool[1] c, float[2] x) => (float[2] y) {
    y = If (c) <then_branch = a () => (float[2] t) { t = Relu(x) }, else_branch = b () => (float[2] u) { u = Abs(x) }>
}"""

BREAKS: list[tuple[str, GraphView]] = [
    ("C01", view("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=19)),
    ("C01", view("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=7)),
    ("C02", view("g (float[2] x) => (float[2] y) { y = com.microsoft.FastGelu(x) }")),
    ("C03", view("g (float[2, 3] x) => (float[2, 1] y) <int64[1] a = {1}> { y = ReduceL1(x, a) }", opset=18)),
    ("C04", view("g (float[2] x) => (uint8[2] y) <float s = {0.1}, uint8 z = {128}> { y = QuantizeLinear(x, s, z) }")),
    (
        "C04",
        view(
            "g (float[1, 2] x) => (float[1, 2] y) <int8[2, 2] w = {1, 2, 3, 4}, float s = {0.1}> "
            "{ d = DequantizeLinear(w, s) y = MatMul(x, d) }"
        ),
    ),
    ("C05", view("g (float[batch, 2] x) => (float[batch, 2] y) { y = Relu(x) }")),
    ("C05", view("g (float[0, 2] x) => (float[0, 2] y) { y = Relu(x) }")),
    ("C05", view("g (float x) => (float y) { y = Relu(x) }")),
    ("C06", of_two_gigabytes()),
    ("C07", view(LOOP)),
    ("C07", view(BRANCH)),
    ("C08", view("g (float[2, 2] x) => (float[2, 2] y) { y = Trilu(x) }")),
    ("C08", view("g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { b = Neg(a) y = Add(x, b) }")),
    ("C09", view("g (float[2] x) => (int64[1, found] y) { y = NonZero(x) }")),
    ("C09", view("g (float[2] x, int64[1] n) => (float[many] y) { y = Tile(x, n) }")),
    ("C10", with_input_named("x;1")),
    ("C10", view('"a/b" (float[2] x) => (float[2] y) { y = Relu(x) }')),
    ("C11", view("g (float[4] x) => (float[2] y, float[2] b) { a, b = Split(x) y = Relu(a) }")),
    ("C12", view("g (float[2] x, float[2] unread) => (float[2] y) { y = Relu(x) }")),
    ("C12", view("g (float[2] x) => (float[2] y, float[2] x) { y = Relu(x) }")),
    ("C12", view("g (float[2] x) => (float[2] y, float[2] c) <float[2] c = {1, 2}> { y = Relu(x) }")),
    ("C13", view("g (float[2] x) => (float[2] y) <float[2] m = {0, -1000000000}> { y = Add(x, m) }")),
    ("C13", view("g (float[2] x) => (float[2] y) { m = Constant<value_float = -70000.0>() y = Add(x, m) }")),
    ("C14", view("g (bfloat16[2] x) => (bfloat16[2] y) { y = Relu(x) }")),
    ("C15", view("g (double[2] x) => (double[2] y) { y = Relu(x) }")),
    ("C15", view("g (int64[1, 2] x) => (int64[1, 2] y) <int64[1] one = {1}> { y = Add(x, one) }")),
    ("C15", view("g (int64[2] x) => (int64[2] y) <int64 axis = {0}> { y = CumSum(x, axis) }")),
    (
        "C16",
        view("g (float[4, 2] past, int64[1, 1] i, float[1, 2] x) => (float[4, 2] y) { y = ScatterND(past, i, x) }"),
    ),
    (
        "C16",
        view("g (float[4] past, int64[1] i, float[1] x) => (float[4] y) { y = ScatterElements<axis = 0>(past, i, x) }"),
    ),
    ("C17", view("g (float[1, 2] x) => (float[1, 2] y) <float[2] s = {1, 1}> { y = LayerNormalization(x, s) }")),
    ("C18", view("g (float[2] x) => (float[2] y) { y = Relu(x) }", ir_version=14)),
    ("C19", view("g (float[1, 4] x) => (int64[1, 1] y) { y = ArgMax<axis = 1>(x) }")),
    ("C19", view("g (float[1, 4] x) => (int32[1, 1] y) { i = ArgMax<axis = 1>(x) y = Cast<to = 6>(i) }")),
    ("C20", view("g (float[4] x, int64[2] n) => (float[p] y) { a, b = Split(x, n) y = Concat<axis = 0>(b, a) }")),
]


def broken(found: GraphView) -> set[str]:
    return {rule.id for rule in CANN if list(rule.check(found))}


def test_a_whole_graph_breaks_no_rule() -> None:
    assert broken(view(CLEAN)) == set()


@pytest.mark.parametrize(("rule", "graph"), BREAKS)
def test_a_graph_is_caught_by_the_rule_that_it_breaks_alone(rule: str, graph: GraphView) -> None:
    assert broken(graph) == {rule}


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert {rule for rule, _ in BREAKS} == {rule.id for rule in CANN} == {f"C{n:02}" for n in range(1, 21)}


def findings(name: str, found: GraphView) -> list[tuple[str | None, str, str | None]]:
    rule = next(rule for rule in CANN if rule.id == name)
    return [(place.node, place.message, place.severity or rule.severity) for place in rule.check(found)]


def test_what_released_parsers_alone_lack_is_a_warning() -> None:
    gemm = view("g (float[1, 2] x) => (float[1, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = Gemm(x, w) }")
    ((node, message, severity),) = findings("C03", gemm)
    assert (node, severity) == ("n0", WARNING)
    assert "opset 17" in message


def test_a_branch_is_a_warning_and_a_loop_an_error() -> None:
    assert [severity for _, _, severity in findings("C07", view(BRANCH))] == [WARNING]
    assert [severity for _, _, severity in findings("C07", view(LOOP))] == [ERROR]


def test_operators_of_a_newer_opset_are_judged_at_the_one_to_export_with() -> None:
    newer = view("g (float[2] x) => (float[2] y) <float[2] s = {1, 1}> { y = RMSNormalization(x, s) }", opset=23)
    assert broken(newer) == {"C01", "C03", "C08"}
    ((node, message, severity),) = findings("C03", newer)
    assert (node, severity) == ("n0", ERROR)
    assert "at no opset, not at 17" in message


def test_a_computed_shape_operand_breaks_both_rules_that_speak_of_it() -> None:
    assert broken(view("g (float[4] x, int64[2] n) => (float[a, b] y) { y = Reshape(x, n) }")) == {"C09", "C20"}


def test_indices_that_stay_inside_are_fine() -> None:
    assert broken(view("g (float[4] x) => (float[1] y) { i = ArgMax<axis = 0>(x) y = Gather(x, i) }")) == set()


def test_a_mask_at_the_limit_of_float16_is_fine() -> None:
    assert broken(view("g (float[2] x) => (float[2] y) <float[2] m = {0, -65504}> { y = Add(x, m) }")) == set()


def test_int64_for_ids_and_shapes_is_fine() -> None:
    graph = "g (int64[1, 2] ids) => (float[1, 2, 3] y) <float[4, 3] table = {0}> { y = Gather(table, ids) }"
    assert broken(view(graph)) == set()
