"""Matmuls of flattened rows become matmuls of rows."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import Builder, attributes, dims, nodes, only_user, producer, rank, replace, weight


@graph_pass
def normalize_gemm(model: ir.Model, report: Report) -> None:
    """Write a Gemm between two Reshapes, as the tracer spells `addmm`, as MatMul and Add on the unflattened rows.

    before: x [batch, sequence, k] -> Reshape([-1, k]) -> Gemm(W, b) -> Reshape([batch, sequence, n]) -> y
    after:  x -> MatMul(W) -> Add(b) -> y
    refuses when: the Gemm scales or transposes, adds more than one row, or an attribute is not known.
    """
    for gemm in nodes(model, "Gemm"):
        before, after = producer(gemm.inputs[0], "Reshape"), only_user(gemm.outputs[0])
        matrix = weight(gemm.inputs[1])
        if before is None or after is None or after.op_type != "Reshape" or matrix is None:
            continue
        x, y = before.inputs[0], after.outputs[0]
        outer, inner = dims(y), dims(x)
        if (
            x is None
            or outer is None
            or inner is None
            or outer[:-1] != inner[:-1]
            or None in outer
            or (inner[-1], outer[-1]) != matrix.dims
        ):
            continue
        with report.refusing(gemm):
            options = attributes(gemm, alpha=1.0, beta=1.0, transA=0, transB=0)
            if options != {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}:
                raise Refused("the Gemm scales or transposes")
            bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
            if bias is not None and rank(bias) != 1:
                raise Refused("the Gemm adds more than one row")
            builder = Builder(model, gemm)
            product = builder.value("MatMul", [x, gemm.inputs[1]], f"{gemm.name}.product", y)
            if bias is not None:
                product = builder.value("Add", [product, bias], f"{gemm.name}.biased", y)
            replace(y, product)
            report.count += 1
