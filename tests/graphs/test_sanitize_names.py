"""sanitize_names: names hold nothing that a file system or a compiler's command line minds."""

from __future__ import annotations

import onnx_ir as ir
from support.graphs import build, fired, normal

from satchel.graphs.passes.normalize.sanitize_names import sanitize_names

TEXT = "(float[2,3] x) => (float[2,3] y) <float two = {2.0}> { a = Mul(x, two) b = Add(a, x) y = Add(b, a) }"


def graph(**names: str) -> ir.Model:
    model = build(TEXT)
    for value in [*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]:
        value.name = names.get(str(value.name), value.name)
    return model


def test_other_characters_become_dots() -> None:
    after = fired(sanitize_names, graph(two="const/two", a="layer::a 1"), 2, feeds={"x": normal(1, 2, 3)}).model
    assert "const.two" in after.graph.initializers
    assert [v.name for node in after.graph for v in node.outputs] == ["layer..a.1", "b", "y"]


def test_names_that_would_clash_get_a_number() -> None:
    after = fired(sanitize_names, graph(a="a/b", b="a.b"), 1).model
    assert [v.name for node in after.graph for v in node.outputs] == ["a.b.1", "a.b", "y"]
