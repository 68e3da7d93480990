"""Marks each weight of a traced graph with the rule of a recipe that applies to it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, Report
from satchel.graphs.ir.values import IDENTITY, INTERNAL, weight
from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.quant.quantized import QuantizedWeight
from satchel.graphs.quant.recipe import Recipe, Rule
from satchel.runtime.bundle.contract import LOGITS

RULE = "rule"
"""The mark: the rule, where one matched."""

LAYERS = "layers"
"""The mark: the names of the checkpoint's layers that the weight is made of."""


def assign(recipe: Recipe) -> GraphPass:
    """A pass that marks weights; the graph itself stays as it is.

    before: x -> MatMul(W)       ids -> Gather(E)       x -> Experts(gate_up, down)
    after:  the same; W, E, gate_up and down carry their layer's name and the rule that counts for it
          Marks of an earlier recipe are replaced.
    refuses when: no rule matches, or the rule leaves the layer in float (silently).
    """

    def edit(model: ir.Model, report: Report) -> None:
        found = dict(_layers(model))
        for lazy, kind in found.items():
            rule = recipe.rule(layer_name(lazy), kind)
            marks = {LAYERS: (layer_name(lazy),), RULE: rule if rule is not None and rule.bits is not None else None}
            if lazy.meta.items() >= marks.items() or len(layers_of(lazy)) > 1:  # marked before, alone or joined
                continue
            lazy.meta |= marks
            report.count += 1

    return GraphPass("assign", edit, assign.__doc__ or "")


def rule_of(lazy: LazyWeight) -> Rule | None:
    """The rule that a weight is marked with."""
    rule = lazy.meta.get(RULE)
    return rule if isinstance(rule, Rule) else None


def layers_of(lazy: LazyWeight) -> tuple[str, ...]:
    """The checkpoint's layers that a weight is made of; none for a weight that was never marked."""
    layers = lazy.meta.get(LAYERS, ())
    return layers if isinstance(layers, tuple) else ()


def layer_name(lazy: LazyWeight | QuantizedWeight) -> str:
    """The layer to which a weight belongs, as the checkpoint calls it."""
    return str(lazy.name).partition(".weight")[0].removesuffix(".interleaved")


def _layers(model: ir.Model) -> Iterator[tuple[LazyWeight, str]]:
    """Each weight of a linear layer, table or mixture of experts, with its kind."""
    tables = set()
    for node in model.graph:
        lazy = weight(node.inputs[0]) if node.op_type == "Gather" and node.domain == "" else None
        if lazy is not None and not lazy.computed and len(lazy.dims) == 2:
            tables.add(layer_name(lazy))
            yield lazy, "embedding"
    head = _head(model)
    for node in model.graph:
        if node.op_type == "MatMul" and node.domain == "":
            lazy = weight(node.inputs[1])
            if lazy is not None and lazy.name == IDENTITY:
                continue
            if lazy is not None and len(lazy.dims) == 2:
                tied = layer_name(lazy) in tables
                yield lazy, "embedding" if tied else "head" if node is head else "linear"
        elif node.op_type == "Experts" and node.domain == INTERNAL:
            yield from ((lazy, "experts") for lazy in map(weight, node.inputs[3:5]) if lazy is not None)


def _head(model: ir.Model) -> ir.Node | None:
    """The last linear layer in front of the logits."""
    (value,) = [v for v in model.graph.outputs if v.name == LOGITS]
    while (node := value.producer()) is not None:
        if node.op_type == "MatMul":
            return node
        data = [v for v in node.inputs if v is not None and v.producer() is not None]
        if len(data) != 1:
            return None
        value = data[0]
    return None
