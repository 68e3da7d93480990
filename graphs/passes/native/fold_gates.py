"""Gated feed-forward layers: the gate goes into satchel's own linear operator."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.analysis.linear import CODES, fusable, set_input, width
from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import Builder, attributes, constant, nodes, producer, rank, replace, weight
from satchel.graphs.quant.quantized import SOURCE, Derivable
from satchel.runtime.bundle.contract import Layout

GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
"""How ONNX's Gelu names the two ways to compute it, and how the operator does."""


@graph_pass
def fold_gates(model: ir.Model, report: Report) -> None:
    """Let the linear layer of a gated layer multiply the two halves of its outputs, the first through the activation.

    Its panels alternate between the halves then, so that both numbers of a pair are there at the same time.

    before: x -> satchel::Linear -> Split -> gate, up;  gate -> activation -> Mul(up) -> y
    after:  x -> satchel::Linear(gate) -> y
    refuses when: the Split is not into two halves along the last axis, something else reads it or its parts, or the
    activation is none of silu (x * Sigmoid(x)), Gelu and Relu of the first half.
    """
    for split in nodes(model, "Split"):
        product = fusable(split.inputs[0])
        codes = weight(product.inputs[CODES]) if product is not None else None
        source = codes.meta.get(SOURCE) if codes is not None else None
        if product is None or not isinstance(source, Derivable):
            continue
        found = _gated(split)
        if found is None:
            continue  # the three parts of an attention's linear layer, for example
        with report.refusing(split):
            _check(split, product)
            gate = _activation(split, found)
            for index, lazy in enumerate(source.derived(Layout.PANELS, gated=True)):
                set_input(product, CODES + index, Builder(model).shared(lazy))
            product.attributes.add(ir.AttrString("gate", gate))
            product.outputs[0].shape = found.outputs[0].shape
            replace(found.outputs[0], product.outputs[0])
            report.count += 1


def _gated(split: ir.Node) -> ir.Node | None:
    """The Mul of a Split's second part by something that is made of the first, or vice versa."""
    if len(split.outputs) != 2:
        return None
    for part, other in (split.outputs, reversed(split.outputs)):
        for use in part.uses():
            if use.node.op_type == "Mul" and use.node.domain == "":
                factor = use.node.inputs[1 - use.idx]
                maker = factor.producer() if factor is not None else None
                waiting = [maker, *(v.producer() for v in maker.inputs if v is not None)] if maker else []
                if any(node is not None and other in node.inputs and node is not use.node for node in waiting):
                    return use.node
    return None


def _check(split: ir.Node, product: ir.Node) -> None:
    sizes = constant(split.inputs[1]) if len(split.inputs) > 1 else None
    half = width(product)[1] // 2
    axis = attributes(split, axis=0, num_outputs=None)["axis"]
    last = axis in (-1, (rank(split.inputs[0]) or 0) - 1)
    if sizes is None or list(sizes) != [half, half] or not last:
        raise Refused("the linear layer is not split into two halves of its outputs")


def _activation(split: ir.Node, mul: ir.Node) -> str:
    """The operator's name for what the first half goes through before `mul`; nothing else may read what it reads."""
    gate, up = split.outputs
    if up not in mul.inputs or [use.node for use in up.uses()] != [mul] or up.is_graph_output():
        raise Refused("the second half is not multiplied as it is, or is read by something else too")
    (activated,) = (v for v in mul.inputs if v is not up)
    maker = activated.producer() if activated is not None else None
    if maker is None or activated is None or [use.node for use in activated.uses()] != [mul]:
        raise Refused("the activated half is read by something else too")
    readers, name = {use.node for use in gate.uses()}, _name(maker, gate)
    inner = {v.producer() for v in maker.inputs if v is not None and v is not gate} - {None}
    if name is None or readers != {maker, *inner} or gate.is_graph_output() or activated.is_graph_output():
        raise Refused(
            "its activation is not one that the operator knows, or the first half is read by something else too"
        )
    for node in inner:
        if node is not None and (len(node.outputs[0].uses()) != 1 or node.outputs[0].is_graph_output()):
            raise Refused("the activation's sigmoid is read by something else too")
    return name


def _name(maker: ir.Node, gate: ir.Value) -> str | None:
    if maker.domain == "" and maker.op_type == "Gelu" and maker.inputs[0] is gate:
        return GELUS.get(str(attributes(maker, approximate="none")["approximate"]))
    if maker.domain == "" and maker.op_type == "Relu":
        return "relu"
    if maker.domain == "" and maker.op_type == "Mul" and gate in maker.inputs:
        (other,) = [v for v in maker.inputs if v is not gate] or [None]
        sigmoid = producer(other, "Sigmoid")
        return "silu" if sigmoid is not None and sigmoid.inputs[0] is gate else None
    return None
