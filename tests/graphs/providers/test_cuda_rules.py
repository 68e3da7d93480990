"""Each rule of the CUDA provider catches a graph that breaks it and no other rule; a whole graph passes all."""

from __future__ import annotations

from typing import Any

import pytest
from support.provider_graphs import ATTEND, view

from satchel.graphs.providers.cuda_placement import Place, placements
from satchel.graphs.providers.facts import VERSIONS, cuda_kernels
from satchel.graphs.providers.findings import GraphView
from satchel.graphs.providers.rules import CUDA

OLD, NEW = VERSIONS


def graph(text: str, version: str = NEW, **options: Any) -> GraphView:
    return view(text, kernels=cuda_kernels(version), **options)


CLEAN = """decode (int64[1, 1] ids, int64[1, 2, 1, 3] place, float16[1, 2, 8, 4] past, float16[1, 1, 1, 8] mask)
    => (float16[1, 1, 16] logits, float16[1, 2, 8, 4] present)
<float16[16, 8] embed = {0}, float16[8, 8] q = {0}, float16[8, 8] k = {0}, float16[8, 16] head = {0},
 int64[4] heads = {1, 1, 2, 4}, int64[3] flat = {1, 1, 8}> {
    h = Gather(embed, ids)
    query = MatMul(h, q)
    key = MatMul(h, k)
    ATTEND
}""".replace("ATTEND", ATTEND.replace("WRITE", "ScatterND(past, place, kt)"))

ATTENTION = """g ({type}[1, 1, 48] qkv, {type}[1, 1, 8, 16] k, {type}[1, 1, 8, 16] v, int32[1] last, int32[1] total)
    => ({type}[1, 1, 16] y, {type}[1, 1, 8, 16] pk, {type}[1, 1, 8, 16] pv) {{
    y, pk, pv = com.microsoft.GroupQueryAttention<num_heads = 1, kv_num_heads = 1>(qkv, , , k, v, last, total)
}}"""
SHAPES = """g (float[rows, 4] x) => (float[1, many] y) <int64 zero = {0}, int64 four = {4}, int64[1] one = {1}> {
    shape = Shape(x)
    rows = Gather(shape, zero)
    all = Mul(rows, four)
    axis = Unsqueeze(all, one0)
    both = Concat<axis = 0>(one, axis)
    y = Reshape(x, both)
}""".replace("int64[1] one = {1}", "int64[1] one = {1}, int64[1] one0 = {0}")
COPY = "g (float[4] x, float[2] f) => (float[a, b] y) { s = Cast<to = 7>(f) y = Reshape(x, s) }"
BRANCH = """g (bool[1] c, float[2] x) => (float[2] y) {
    y = If (c) <then_branch = a () => (float[2] t) { t = Relu(x) }, else_branch = b () => (float[2] u) { u = Abs(x) }>
}"""
ROUNDED = """g (float[1, 2] x) => (float[1, 2] y) <float s = {0.1}, int8 z = {0}, float[2, 2] w = {1, 2, 3, 4}> {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    y = MatMul(d, w)
}"""
WEIGHT = "g (float[1, 2] x) => (float[1, 2] y) <int8[2, 2] w = {1, 2, 3, 4}, float[2] s = {0.1, 0.2}> "
WRITE = "g (float[4, 2] past, int64[1, 1] i, float[1, 2] x) => (float[4, 2] present, float[4, 2] y) "

CHOSEN_ONCE = """g (float[batch, capacity] mask, float[batch, 2, capacity, 4] past)
    => (float[batch, 2, capacity, 4] present, float[batch, capacity] y) { present = Relu(past) y = Relu(mask) }"""
GROWING = """g (float[batch, 2, before, 4] past, float[batch, 2, 1, 4] new)
    => (float[batch, 2, after, 4] present) { present = Concat<axis = 2>(past, new) }"""

BREAKS: list[tuple[str, GraphView]] = [
    ("U01", graph("g (float[2] x) => (uint8[2] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }")),
    ("U01", graph("g (float[2] x) => (float[2] y) { y = com.microsoft.NoSuchOperator(x) }")),
    ("U02", graph("g (float[2] x) => (float[2] y) { y = Identity(x) }", OLD, opset=21)),
    ("U02", graph("g (float[2] x) => (float[2] y) { y = Cos(x) }", OLD, opset=22)),
    (
        "U03",
        graph("g (uint8[2, 2] a) => (int32[2, 2] y) <int8[2, 2] b = {1, 2, 3, 4}> { y = MatMulInteger(a, b) }"),
    ),
    ("U03", graph("g (int16[2, 2] a, int16[2, 2] b) => (bool[2, 2] y) { y = Less(a, b) }")),
    (
        "U04",
        graph("g (float[2] x) => (float[2] y) <int32[2] b = {1, 2}, float s = {0.1}> "
              "{ d = DequantizeLinear(b, s) y = Add(x, d) }"),
    ),
    ("U05", graph("g (bool[2] c, int8[2] x, int8[2] z) => (int8[2] y) { y = Where(c, x, z) }")),
    ("U05", graph("g (bool[2] c, bool[2] x, bool[2] z) => (bool[2] y) { y = Where(c, x, z) }")),
    ("U05", graph("g (bfloat16[2] x) => (bfloat16[2] y) <int64 a = {0}> { y = CumSum(x, a) }")),
    ("U05", graph("g (float16 a, float16 b, float16 c) => (float16[n] y) { y = Range(a, b, c) }")),
    ("U06", graph("g (float[2] x) => (string[2] y) { y = Cast<to = 8>(x) }")),
    ("U06", graph("g (float[2] x) => (int64[1] y) { y = ArgMax<axis = 0, select_last_index = 1>(x) }")),
    (
        "U07",
        graph("g (float[1, 1, 2] x, float[1, 6, 2] w, float[1, 6, 2] r) => (float[1, 1, 1, 2] y) "
              "{ y = GRU<hidden_size = 2>(x, w, r) }"),
    ),
    ("U08", graph(SHAPES)),
    ("U09", graph(COPY)),
    ("U10", graph(COPY, phase="decode")),
    ("U11", graph("g (float[batch, 2] x) => (float[batch, 2] y) { y = Relu(x) }", phase="decode")),
    ("U11", graph(GROWING, phase="decode")),
    ("U12", graph(BRANCH, phase="decode")),
    ("U13", graph(ROUNDED)),
    ("U14", graph(WEIGHT + "{ d = DequantizeLinear<axis = 1>(w, s) c = Transpose(d) y = MatMul(x, c) }")),
    ("U14", graph(WEIGHT + "{ d = DequantizeLinear<axis = 0>(w, s) y = MatMul(x, d) }")),
    ("U14", graph(WEIGHT + "{ d = DequantizeLinear<axis = 1>(w, s) a = MatMul(x, d) y = MatMul(a, d) }")),
    ("U14", graph(WEIGHT + "{ d = DequantizeLinear<axis = 1>(w, s) y = MatMul(x, d) }", OLD)),
    ("U15", graph(WRITE + "{ present = ScatterND(past, i, x) y = Relu(past) }")),
    ("U16", graph("g (float[2] x) => (float[2] y) { y = Relu(x) }", OLD, ir_version=14)),
    ("U17", graph("g (float[2] x) => (float[2] y) { a = com.microsoft.FastGelu(x) y = Relu(a) }")),
    ("U18", graph("g (float[2] x) => (float[2] y) { y = mine.Twice(x) }", libraries=frozenset({"mine"}))),
]  # fmt: skip

PASSES: list[GraphView] = [
    graph(CLEAN, phase="decode"),
    graph(CLEAN, OLD, phase="decode"),
    graph(ATTENTION.format(type="float16")),
    graph(CHOSEN_ONCE, phase="decode"),
    graph(WEIGHT + "{ d = DequantizeLinear<axis = 1>(w, s) y = MatMul(x, d) }"),
    graph(WRITE + "{ present = ScatterND(past, i, x) y = Relu(present) }"),
    graph("g (float[2] x) => (float[2] y) { y = Relu(x) }", ir_version=14),
    graph("g (float[batch, 2] x) => (float[batch, 2] y) { y = Relu(x) }"),
    graph("g (float[2] x) => (float[2] y) { y = Identity(x) }", opset=21),
    graph("g (float[2] x, float[2] z) => (float[4] y) { y = Concat<axis = 0>(x, z) }"),
]


def broken(found: GraphView) -> set[str]:
    return {rule.id for rule in CUDA if list(rule.check(found))}


@pytest.mark.parametrize("whole", PASSES)
def test_a_whole_graph_breaks_no_rule(whole: GraphView) -> None:
    assert broken(whole) == set()


@pytest.mark.parametrize(("rule", "wrong"), BREAKS)
def test_a_graph_is_caught_by_the_rule_that_it_breaks_alone(rule: str, wrong: GraphView) -> None:
    assert broken(wrong) == {rule}


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert {rule for rule, _ in BREAKS} == {rule.id for rule in CUDA}


def test_attention_in_float32_has_no_kernel() -> None:
    found = graph(ATTENTION.format(type="float"))
    assert broken(found) == {"U03"}
    rule = next(rule for rule in CUDA if rule.id == "U03")
    (place,) = rule.check(found)
    assert "qkv is float" in place.message and "bfloat16, float16" in place.message


def test_shapes_are_followed_to_the_node_that_reads_them_on_the_host() -> None:
    found = graph(SHAPES)
    places = {node.op_type: place for node, place in placements(found).items()}
    assert places == {
        "Shape": Place.DEVICE, "Gather": Place.HOST_PREFERRED, "Mul": Place.HOST_PREFERRED,
        "Unsqueeze": Place.HOST_PREFERRED, "Concat": Place.HOST_PREFERRED, "Reshape": Place.DEVICE,
    }  # fmt: skip


def test_a_copy_beside_a_node_without_a_kernel_is_not_told_again() -> None:
    found = graph("g (float[2] x) => (float[2] y) { a = Relu(x) b = com.microsoft.NoSuchOperator(a) y = Abs(b) }")
    assert broken(found) == {"U01", "U17"}
