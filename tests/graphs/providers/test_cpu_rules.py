"""Each rule of the CPU provider catches a graph that breaks it and no other rule; a whole graph passes all."""

from __future__ import annotations

from typing import Any

import pytest
from support.provider_graphs import view

from satchel.graphs.providers.findings import GraphView
from satchel.graphs.providers.kernels import Formal, Kernel, KernelTable, Signature
from satchel.graphs.providers.rules import CPU

UNARY = Signature((Formal("x", "T"),), (Formal("y", "T"),))


def kernel(since: int, until: int | None, *types: str) -> Kernel:
    return Kernel(since, until, {"T": frozenset(types)}, (UNARY,))


TABLE = KernelTable(
    "a table",
    {"Relu": (6, 13, 14), "Abs": (6, 13), "Neg": (6, 13), "com.microsoft::FastGelu": (1,)},
    {
        "Relu": (kernel(6, 12, "float"), kernel(14, None, "float", "int8")),
        "Abs": (kernel(6, 12, "float"),),
        "com.microsoft::FastGelu": (kernel(1, None, "float"),),
    },
)


def graph(text: str, **options: Any) -> GraphView:
    return view(text, kernels=TABLE, **options)


BREAKS: list[tuple[str, GraphView]] = [
    ("P01", graph("g (float[2] x) => (float[2] y) { y = Neg(x) }")),
    ("P02", graph("g (float[2] x) => (float[2] y) { y = Abs(x) }")),
    ("P02", graph("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=13)),
    ("P03", graph("g (int32[2] x) => (int32[2] y) { y = Relu(x) }")),
    ("P04", graph("g (float16[2] x) => (float16[2] y) { y = Relu(x) }")),
    ("P05", graph("g (float[2] x) => (float[2] y) { a = com.microsoft.FastGelu(x) y = Relu(a) }")),
    ("P06", graph("g (float[2] x) => (float[2] y) { y = mine.Twice(x) }", libraries=frozenset({"mine"}))),
]


def broken(found: GraphView) -> set[str]:
    return {rule.id for rule in CPU if list(rule.check(found))}


@pytest.mark.parametrize("opset", [12, 17])
def test_a_whole_graph_breaks_no_rule(opset: int) -> None:
    assert broken(graph("g (float[2] x) => (float[2] y) { a = Relu(x) y = Relu(a) }", opset=opset)) == set()


@pytest.mark.parametrize(("rule", "wrong"), BREAKS)
def test_a_graph_is_caught_by_the_rule_that_it_breaks_alone(rule: str, wrong: GraphView) -> None:
    assert broken(wrong) == {rule}


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert {rule for rule, _ in BREAKS} == {rule.id for rule in CPU}
