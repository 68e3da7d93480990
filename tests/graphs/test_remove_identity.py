"""remove_identity: nodes that change nothing go, and only those."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, expose, fired, normal, operators, untouched

from satchel.graphs.passes.normalize.remove_identity import remove_identity

X = {"x": normal(1, 2, 3, 5)}
CONSTANTS = """int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] five = {5}, int64[1] back = {-1},
    int64[1] end = {9223372036854775807}, int64[3] shape = {2, 3, 5}, int64[3] kept = {0, 0, 5}, int64[2] rows = {6, 5},
    int64[2] rest = {-1, 15}, int64[2] keep_rest = {0, -1}, int64[1] flat = {-1},
    int64[3] column = {0, 5, 1}"""


def between(nodes: str, source: str = "batch,3,5", result: str = "batch,3,5", kind: str = "float") -> ir.Model:
    """x -> Neg -> a -> `nodes` -> b -> Abs -> y."""
    return build(f"(float[{source}] x) => ({kind}[{result}] y) <{CONSTANTS}> {{ a = Neg(x) {nodes} y = Abs(b) }}")


@pytest.mark.parametrize(
    "nodes",
    [
        "b = Identity(a)",
        "b = Cast<to = 1>(a)",
        "b = CastLike(a, x)",
        "b = Slice(a, zero, end, one)",
        "b = Slice(a, zero, end, two, one)",
        "b = Slice(a, zero, five, two)",
        "b = Reshape(a, kept)",
        "b = Transpose<perm = [0, 1, 2]>(a)",
        "b = Concat<axis = 2>(a)",
        "b = Max(a)",
        "whole = Shape(a) b = Expand(a, whole)",
        "whole = Shape<start = 0>(a) b = Expand(a, whole)",
        "empty = Slice(a, zero, zero, one) b = Concat<axis = 1>(empty, a)",
        "empty = Slice(a, zero, zero, two) b = Concat<axis = -1>(a, empty)",
    ],
)
def test_a_node_that_changes_nothing_goes(nodes: str) -> None:
    result = fired(remove_identity, between(nodes), 1, feeds=X, exact=True)
    assert operators(result.model) == {"Neg": 1, "Abs": 1}


@pytest.mark.parametrize("perm", [(1, 0, 2), (1, 2, 0), (2, 0, 1)], ids=str)
def test_a_transpose_and_its_inverse_go_together(perm: tuple[int, ...]) -> None:
    there, back = list(perm), np.argsort(perm).tolist()
    model = between(f"t = Transpose<perm = {there}>(a) b = Transpose<perm = {back}>(t)")
    assert operators(fired(remove_identity, model, 1, feeds=X, exact=True).model) == {"Neg": 1, "Abs": 1}


@pytest.mark.parametrize("perm", ["[1, 2, 0]", "[2, 0, 1]"])
def test_a_cycle_of_three_axes_twice_is_no_inverse(perm: str) -> None:
    shape = "5,batch,3" if perm == "[1, 2, 0]" else "3,5,batch"
    model = between(f"t = Transpose<perm = {perm}>(a) b = Transpose<perm = {perm}>(t)", result=shape)
    assert untouched(remove_identity, model) == []


def test_a_transpose_between_a_pair_that_has_other_readers_stays_for_them() -> None:
    model = expose(between("t = Transpose<perm = [1, 2, 0]>(a) b = Transpose<perm = [2, 0, 1]>(t)"), "t")
    result = fired(remove_identity, model, 1, feeds=X, exact=True)
    assert operators(result.model) == {"Neg": 1, "Abs": 1, "Transpose": 1}


@pytest.mark.parametrize(
    ("nodes", "result"),
    [
        ("r = Reshape(a, rows) b = Reshape(r, rest)", "2,15"),
        ("r = Reshape(a, keep_rest) b = Reshape(r, keep_rest)", "2,15"),
        ("r = Reshape(a, flat) b = Reshape(r, rest)", "2,15"),
    ],
    ids=["one inferred", "both keep the first", "by way of one axis"],
)
def test_two_reshapes_become_one(nodes: str, result: str) -> None:
    found = fired(remove_identity, between(nodes, "2,3,5", result), 1, feeds=X, exact=True)
    assert operators(found.model) == {"Neg": 1, "Reshape": 1, "Abs": 1}


@pytest.mark.parametrize(
    ("nodes", "result"),
    [
        ("r = Reshape(a, rows) b = Reshape(r, column)", "6,5,1"),
        ("r = Reshape<allowzero = 1>(a, rows) b = Reshape(r, rest)", "2,15"),
        ("r = Reshape(a, rows) b = Reshape<allowzero = 1>(r, rest)", "2,15"),
        ("s = Shape(a) r = Reshape(a, s) b = Reshape(r, rest)", "2,15"),
    ],
    ids=["a zero that means another dimension", "allowzero before", "allowzero after", "a target that is not constant"],
)
def test_reshapes_whose_targets_cannot_be_joined_are_left_alone(nodes: str, result: str) -> None:
    model = between(nodes, "2,3,5", result)
    if "Shape(a)" in nodes:
        next(n for n in model.graph if n.op_type == "Reshape").outputs[0].shape = None
    assert untouched(remove_identity, model) == []


@pytest.mark.parametrize(
    ("nodes", "result", "kind"),
    [
        ("b = Cast<to = 11>(a)", "batch,3,5", "double"),
        ("d = Cast<to = 11>(x) b = CastLike(a, d)", "batch,3,5", "double"),
        ("b = Slice(a, one, end, one)", "batch,2,5", "float"),
        ("b = Slice(a, zero, end, two, two)", "batch,3,3", "float"),
        ("b = Slice(a, back, end, two)", "batch,3,1", "float"),
        ("b = Slice(a, zero, two, two)", "batch,3,2", "float"),
        ("b = Transpose<perm = [0, 2, 1]>(a)", "batch,5,3", "float"),
        ("b = Concat<axis = 1>(a, a)", "batch,6,5", "float"),
        ("b = Concat<axis = 1>(a, x)", "batch,6,5", "float"),
        ("b = Reshape(a, flat)", "n", "float"),
        ("b = Max(a, x)", "batch,3,5", "float"),
        ("other = Shape(x) b = Expand(a, other)", "batch,3,5", "float"),
        ("part = Shape<start = 1>(a) b = Expand(a, part)", "batch,3,5", "float"),
    ],
)
def test_a_node_that_changes_something_or_might_is_left_alone(nodes: str, result: str, kind: str) -> None:
    assert untouched(remove_identity, between(nodes, result=result, kind=kind)) == []


def test_an_output_keeps_its_name_when_its_node_goes() -> None:
    model = build("(float[batch,3,5] x) => (float[batch,3,5] y) { a = Neg(x) y = Identity(a) }")
    assert operators(fired(remove_identity, model, 1, feeds=X, exact=True).model) == {"Neg": 1}


@pytest.mark.parametrize(
    "text",
    [
        "(float[2,3,5] x) => (float[2,3,5] y) { y = Identity(x) }",
        "(float[2,3,5] x) => (float[2,3,5] a, float[2,3,5] y) { a = Neg(x) y = Identity(a) }",
        "() => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Identity(w) }",
    ],
    ids=["an input", "another output", "an initializer"],
)
def test_an_output_that_is_something_else_too_keeps_its_node(text: str) -> None:
    assert untouched(remove_identity, build(text)) == []


COPIES = """(int64[batch,sequence] x) => (int64[batch,sequence] y) <int64[1] zero = {0}, int64[1] one = {1},
    int64[1] end = {9}, int64[1] axis = {AXIS}, int64[3] four = {4, 1, 1}, int64 which = {1}, int64[1] list = {1},
    int64[4,batch,sequence] all, int64[batch,sequence] b> {
    a = Neg(x) u = Unsqueeze(a, axis) all = Expand(u, four) NODES y = Abs(b) }"""


@pytest.mark.parametrize(
    "nodes", ["b = Gather(all, which)", "some = Slice(all, one, end, zero) b = Gather(some, which)"]
)
def test_one_of_the_copies_of_a_value_is_the_value(nodes: str) -> None:
    model = build(COPIES.replace("NODES", nodes).replace("AXIS", "0"))
    result = fired(remove_identity, model, 1, feeds={"x": np.arange(6).reshape(2, 3)}, exact=True)
    assert operators(result.model) == {"Neg": 1, "Abs": 1}


def test_a_row_of_a_value_is_not_taken_for_one_of_its_copies() -> None:
    model = build(
        """(int64[4,sequence] x) => (int64[sequence] y) <int64 which = {1}, int64[sequence] b> {
        a = Neg(x) b = Gather(a, which) y = Abs(b) }"""
    )
    assert untouched(remove_identity, model) == []


def test_a_slice_that_leaves_as_much_as_there_was_goes_wherever_it_begins() -> None:
    """As the tracer writes x[:, -length:], where the length is that of x."""
    model = build(
        """(float[batch,sequence] x) => (float[batch,sequence] y) <int64[1] axis = {1}, int64[1] step = {1},
        int64[1] end = {9223372036854775807}, float[batch,sequence] b> {
        a = Neg(x) n = Shape<start = 1, end = 2>(a) start = Neg(n) b = Slice(a, start, end, axis, step) y = Abs(b) }"""
    )
    result = fired(remove_identity, model, 1, feeds={"x": normal(1, 2, 5)}, exact=True)
    assert operators(result.model) == {"Neg": 1, "Abs": 1}
