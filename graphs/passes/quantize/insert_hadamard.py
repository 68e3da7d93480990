"""Outliers in front of a down projection are spread over blocks of channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.channels import gated_input
from satchel.graphs.analysis.rotations import hadamard
from satchel.graphs.ir.contract import GraphPass, Refused, Report, graph_pass
from satchel.graphs.ir.values import Builder, nodes, rank, replace, weight
from satchel.graphs.ir.weights import left_multiplied


def insert_hadamard(block: int) -> GraphPass:
    """Multiply the input of each gated layer's down projection by a Hadamard matrix H in blocks of `block` channels,
    and its weight by the inverse.

    H is a plain tensor `const/hadamard.<block>`, not a lazy weight: what stores weights in fewer bits leaves it alone.

    before: x = act(gate) * up -> MatMul(W) -> y
    after:  x -> Reshape [batch, new, k / block, block] -> MatMul(H) -> Reshape [batch, new, k] ->
            MatMul(blockdiag(H).T W) -> y
    refuses when: the width is not a multiple of `block`, x does not have three dimensions, or x or W are read
    elsewhere too.

    Args:
        block: Channels that are mixed with each other, a power of two.

    Raises:
        ValueError: `block` is not a power of two.

    Source: QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, in blocks.
    """
    matrix = hadamard(block)

    def edit(model: ir.Model, report: Report) -> None:
        shared: ir.Value | None = None
        for node in nodes(model, "MatMul"):
            with report.refusing(node):
                up = gated_input(node)
                if up is None:
                    continue
                if (up.stop - up.start) % block:
                    raise Refused(f"{up.stop - up.start} channels are not a multiple of {block}")
                if rank(node.inputs[0]) != 3:
                    raise Refused("its input does not have three dimensions")
                shared = shared or Builder(model).constant(matrix, f"hadamard.{block}")
                _insert(model, node, matrix, shared)
                report.count += 1

    return graph_pass(edit, insert_hadamard)


def _insert(model: ir.Model, node: ir.Node, matrix: np.ndarray, shared: ir.Value) -> None:
    x, down = node.inputs[0], weight(node.inputs[1])
    if x is None or x.shape is None or down is None or node.inputs[1] is None:
        return
    builder, name, block, width = Builder(model, node), str(node.name), len(matrix), down.dims[0]
    blocks = builder.shape(0, 0, width // block, block)
    split = builder.value("Reshape", [x, blocks], f"{name}.blocks")
    mixed = builder.value("MatMul", [split, shared], f"{name}.hadamard")
    for value in (split, mixed):
        value.shape, value.type = ir.Shape([*list(x.shape)[:-1], width // block, block]), x.type
    whole = builder.shape(0, 0, width)
    node.replace_input_with(0, builder.value("Reshape", [mixed, whole], f"{name}.mixed", x))
    replace(node.inputs[1], builder.initializer(left_multiplied(down, matrix.T, f"{down.name}.hadamard")))
