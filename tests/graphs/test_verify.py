"""verify: each invariant of a graph, broken, is found and named."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
from support.graphs import build, normal

from satchel.graphs.ir.contract import PassError
from satchel.graphs.ir.verify import signature, verify


def whole() -> ir.Model:
    return build(
        """(float[3] x, float[3] z) => (float[3] y) <float[1] c = {2.0}> {
            a = Mul(x, c) b = Add(a, w) s, m, d, t = com.microsoft.SkipLayerNormalization(b, z, w) y = Add(s, t)
        }""",
        w=normal(1, 3),
    )


def node(model: ir.Model, output: str) -> ir.Node:
    return next(n for n in model.graph if n.outputs[0].name == output)


def move_to_the_end(model: ir.Model) -> None:
    moved = node(model, "a")
    model.graph.remove(moved)
    model.graph.append(moved)


def read_from_nowhere(model: ir.Model) -> None:
    node(model, "a").replace_input_with(1, ir.val("nowhere"))


def name_twice(model: ir.Model) -> None:
    node(model, "a").outputs[0].name = "b"


def name_like_an_input(model: ir.Model) -> None:
    node(model, "a").outputs[0].name = "x"


def take_a_name(model: ir.Model) -> None:
    node(model, "a").outputs[0].name = ""


def forget_a_domain(model: ir.Model) -> None:
    del model.opset_imports["com.microsoft"]


def forget_values(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = None


def make_an_output_of_nothing(model: ir.Model) -> None:
    model.graph.outputs.append(ir.val("z2"))


BROKEN: dict[Callable[[ir.Model], None], str] = {
    move_to_the_end: "node node_1 (Add) reads a, which nothing before it makes",
    read_from_nowhere: "node node_0 (Mul) reads nowhere, which nothing before it makes",
    name_twice: "two values are called b",
    name_like_an_input: "two values are called x",
    take_a_name: "a value has no name",
    forget_a_domain: "node node_2 is of domain 'com.microsoft', which the model does not import",
    forget_values: "initializer w has no value",
    make_an_output_of_nothing: "output z2 is made by nothing",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_broken_graph_is_found_and_named(damage: Callable[[ir.Model], None]) -> None:
    model = whole()
    damage(model)
    with pytest.raises(PassError) as raised:
        verify(model)
    assert str(raised.value) == BROKEN[damage]


def test_optional_outputs_that_are_not_asked_for_need_no_name() -> None:
    model = whole()
    for output in node(model, "s").outputs[1:3]:
        output.name = ""
    verify(model)


def test_the_signature_is_the_names_in_order() -> None:
    assert signature(whole()) == (("x", "z"), ("y",))
