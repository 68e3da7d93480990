"""Products that float16 does not hold are computed smaller, and made large again behind the linear layer."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.float32_islands import LARGEST, too_large, write_too_large
from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder, only_user, producer, weight

MARGIN = 4
"""A scaled product is at most a part of float16's largest, so that another text may have larger ones."""
MOST = 15
"""The largest exponent: 2**15 is in float16, and so is 2**-15 times a number with ten bits behind its first."""


@graph_pass
def scale_products(model: ir.Model, report: Report) -> None:
    """Divide a product that float16 does not hold by a power of two, and multiply what a linear layer makes of it.

    The product of a gate and a branch reaches far beyond the result of the layer that reads it. Powers of two are exact
    in float32. What is left is computed in float32 (`float32_islands`).

    before: a, b -> Mul -> MatMul(W) -> y
    after:  Mul(a, 2**-n), b -> Mul -> MatMul(W) -> Mul(2**n) -> y
    refuses when: the product has other readers than one linear layer, or the layer's result is too large itself
    (silently).
    """
    sizes = too_large(model)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    for name, size in list(sizes.items()):
        value = values.get(name)
        product, linear = producer(value, "Mul"), None if value is None else only_user(value)
        exponent = math.ceil(math.log2(size * MARGIN / LARGEST))
        if product is None or linear is None or linear.op_type != "MatMul" or exponent > MOST:
            continue
        output, factor = linear.outputs[0], product.inputs[0]
        if linear.inputs[0] is not value or weight(linear.inputs[1]) is None or output.name in sizes or factor is None:
            continue
        down, up = (_scalar(model, sign * exponent) for sign in (-1, 1))
        smaller = Builder(model, product).value("Mul", [factor, down], f"{name}.smaller", factor)
        product.replace_input_with(0, smaller)
        following = next(node for node in model.graph if node in {use.node for use in output.uses()})
        larger = Builder(model, following).value("Mul", [output, up], f"{output.name}.larger", output)
        for use in list(output.uses()):
            if use.node is not larger.producer():
                use.node.replace_input_with(use.idx, larger)
        del sizes[name]
        report.count += 1
    write_too_large(model, sizes)


def _scalar(model: ir.Model, exponent: int) -> ir.Value:
    return Builder(model).constant(np.asarray(2.0**exponent, np.float32), f"two.to.{exponent}")
