"""remove_duplicates: the same computation is done once, and only the same."""

from __future__ import annotations

import pytest
from support.graphs import build, fired, normal, operators, untouched

from satchel.graphs.ir.values import weight
from satchel.graphs.passes.normalize.remove_duplicates import RANDOM, remove_duplicates
from satchel.graphs.quant.quantized import LAYOUT
from satchel.runtime.bundle.contract import Layout

X = {"x": normal(1, 3, 5)}


def two(first: str, second: str, constants: str = "float[1] c = {2.0}") -> str:
    return f"(float[3,5] x) => (float[3,5] y) <{constants}> {{ a = {first} b = {second} y = Sub(a, b) }}"


def test_three_nodes_with_many_outputs_become_one() -> None:
    split = "{0}, {1} = Split<axis = 1>(x, sizes)"
    text = f"""(float[3,5] x) => (float[3,2] y) <int64[2] sizes = {{2, 3}}> {{
        {split.format("a", "b")} {split.format("c", "d")} {split.format("e", "f")}
        m = ReduceMean<keepdims = 1>(d) n = Mul(f, m) o = ReduceMean<keepdims = 1>(n) t = Mul(a, o) u = Add(t, c)
        y = Add(u, e)
    }}"""
    assert operators(fired(remove_duplicates, build(text), 2, feeds=X, exact=True).model)["Split"] == 1


def test_equal_constants_become_one_initializer() -> None:
    model = build(two("Mul(x, c)", "Add(x, d)", "float[1] c = {2.0}, float[1] d = {2.0}"))
    assert list(fired(remove_duplicates, model, 1, feeds=X, exact=True).model.graph.initializers) == ["c"]


@pytest.mark.parametrize(
    "other",
    ["float[1] d = {3.0}", "float d = {2.0}", "float[1,1] d = {2.0}"],
    ids=["another value", "another rank", "another shape"],
)
def test_constants_that_differ_stay_two(other: str) -> None:
    assert untouched(remove_duplicates, build(two("Mul(x, c)", "Add(x, d)", f"float[1] c = {{2.0}}, {other}"))) == []


def test_constants_of_the_same_bytes_but_another_type_stay_two() -> None:
    text = """(float[3,5] x) => (float[3,5] y) <float8e4m3fn[1] c = {0}, float8e4m3fnuz[1] d = {0}, int8[1] e = {0}> {
        s = Cast<to = 1>(c) t = Cast<to = 1>(d) u = Cast<to = 1>(e) a = Add(x, s) b = Add(a, t) y = Add(b, u)
    }"""
    assert untouched(remove_duplicates, build(text)) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Softmax<axis = 0>(x)", "Softmax<axis = 1>(x)"),
        ("Neg(x)", "Abs(x)"),
        ("Sub(x, c)", "Sub(c, x)"),
        ("Clip(x, c)", 'Clip(x, "", c)'),
        ("Clip(x)", "com.microsoft.Clip(x)"),
        ("Softmax(x)", "Softmax<axis = -1>(x)"),
    ],
    ids=["attribute", "operator", "order of inputs", "place of an input", "domain", "attribute left out"],
)
def test_nodes_that_differ_stay_two(first: str, second: str) -> None:
    assert untouched(remove_duplicates, build(two(first, second))) == []


def test_a_list_and_a_tensor_among_the_attributes_are_compared() -> None:
    text = """(float[3,5] x) => (float[3,5] y) <int64[1] n = {{1}}> {{
        a = ConstantOfShape<value = float[1] {{{0}}}>(n) b = ConstantOfShape<value = float[1] {{{1}}}>(n)
        c = Transpose<perm = [1, 0]>(x) d = Transpose<perm = [{2}]>(x)
        e = Mul(c, a) f = Mul(d, b) g = Transpose(e) h = ReduceMean<keepdims = 0>(f) y = Add(g, h)
    }}"""
    same, other = text.format(2.5, 2.5, "1, 0"), text.format(2.5, 3.5, "0, 1")
    fired(remove_duplicates, build(same), 3, feeds=X, exact=True)
    assert untouched(remove_duplicates, build(other)) == []


@pytest.mark.parametrize("op_type", sorted(RANDOM))
def test_random_operators_stay_two(op_type: str) -> None:
    source = "" if op_type in ("RandomNormal", "RandomUniform") else "x"
    attribute = "" if source else "<shape = [3, 5]>"
    node = f"{op_type}{attribute}({source})"
    assert untouched(remove_duplicates, build(two(node, node))) == []


def test_nodes_with_a_subgraph_stay_two() -> None:
    branch = "g () => (float[3,5] z) { z = Neg(x) }"
    node = f"If<then_branch = {branch}, else_branch = {branch}>(go)"
    assert untouched(remove_duplicates, build(two(node, node, "bool go = {1}"))) == []


def test_outputs_of_the_graph_keep_a_node_each() -> None:
    assert (
        untouched(remove_duplicates, build("(float[3] x) => (float[3] y, float[3] z) { y = Neg(x) z = Neg(x) }")) == []
    )


def test_constants_that_a_device_makes_stay_two() -> None:
    model = build(two("Add(x, v)", "Mul(x, w)"), v=normal(2, 5), w=normal(2, 5))
    assert operators(fired(remove_duplicates, model, 1).model) == {"Add": 1, "Mul": 1, "Sub": 1}
    made = build(two("Add(x, v)", "Mul(x, w)"), v=normal(2, 5), w=normal(2, 5))
    for name in "vw":
        weight(made.graph.initializers[name]).meta[LAYOUT] = Layout.PANELS  # type: ignore[union-attr]
    assert untouched(remove_duplicates, made) == []
