"""Linear layers with weights in float16 become satchel's own operators."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.analysis.linear import native_operator
from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, Builder, last_dim, nodes, replace, weight
from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.passes.float16.store_float16 import halved
from satchel.graphs.quant.quantized import HalfWeight
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.layouts import HALF_BITS


@graph_pass
def insert_linear_float(model: ir.Model, report: Report) -> None:
    """Multiply with weights in float16 in panels, in single precision; a tied head reads the embedding's own table.

    The panels are made on the device (HalfWeight.derived). The table is float32 until store_float16 has run.

    before: x -> MatMul(W) -> y                           x -> FusedMatMul(E, transB) -> y
    after:  x -> satchel::Linear(panels, bits = 16) -> y  x -> satchel::TableLinear(E) -> y
    refuses when: x is not known to be as wide as the weight, or a tied head has other attributes than transB. What no
    checkpoint holds, or is no matrix in float32, is left alone (silently).
    """
    for node in [*nodes(model, "MatMul"), *nodes(model, "FusedMatMul", MICROSOFT)]:
        lazy = weight(node.inputs[1])
        if lazy is None or lazy.computed or lazy.dtype != ir.DataType.FLOAT or len(lazy.dims) != 2:
            continue
        tied = node.op_type == "FusedMatMul"
        if tied and (set(node.attributes) != {"transB"} or not node.attributes.get_int("transB", 0)):
            report.refuse(node, "the linear layer scales or transposes in another way than by transB")
        elif last_dim(node.inputs[0]) != lazy.dims[1 if tied else 0]:
            report.refuse(node, "its input is not known to be as wide as its weight")
        else:
            replace(node.outputs[0], _head(model, node, lazy) if tied else _linear(model, node, lazy))
            report.count += 1


def _linear(model: ir.Model, node: ir.Node, lazy: LazyWeight) -> ir.Value:
    builder, (inputs, outputs) = Builder(model, node), lazy.dims
    half = HalfWeight(lazy.name, halved(lazy, "export with --precision fp32"))
    panels = [builder.shared(made) for made in half.derived(Layout.PANELS)]
    sizes = {"inputs": inputs, "outputs": outputs, "bits": HALF_BITS, "block": 0}
    return native_operator(builder, "Linear", [node.inputs[0], *panels], f"{node.name}.linear", node.outputs[0], sizes)


def _head(model: ir.Model, node: ir.Node, table: LazyWeight) -> ir.Value:
    outputs, inputs = table.dims
    sizes = {"inputs": inputs, "outputs": outputs, "block": 0}
    return native_operator(
        Builder(model, node), "TableLinear", node.inputs[:2], f"{node.name}.table", node.outputs[0], sizes
    )
