"""A product whose input goes to a kernel that rounds it to int8, in two parts that together lose almost nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.values import Builder
from satchel.runtime.bundle.layouts import INT8_MAX, SMALLEST_RANGE

Product = Callable[[ir.Value, str], ir.Value]
"""Multiplies rows, and calls the result by a name."""


def in_two_parts(
    builder: Builder, name: str, x: ir.Value, sizes: tuple[int, int, int], multiply: Product, like: ir.Value
) -> ir.Value:
    """r = x rounded to int8 group by group;  r, x - r -> multiply -> Add.

    A kernel that rounds so itself loses nothing of r, and of the rest little.

    Args:
        builder: Adds the nodes.
        name: Their common prefix.
        x: [.., rows, inputs].
        sizes: Its number of axes, its inputs, and those of a group.
        multiply: From [.., 2 rows, inputs] to [.., 2 rows, outputs].
        like: The value whose type and shape the result has.
    """
    axes, inputs, block = sizes
    kept = [0] * (axes - 1)

    def shape(*sizes: int) -> ir.Value:
        return builder.constant(np.asarray(sizes, np.int64), "shape." + "_".join(map(str, sizes)))

    axis = builder.constant(np.asarray([-1], np.int64), "axis.last")
    inverse = builder.constant(np.asarray(1 / INT8_MAX, np.float32), "int8_step")
    tiny = builder.constant(np.asarray(SMALLEST_RANGE), "smallest")
    groups = builder.value("Reshape", [x, shape(*kept, inputs // block, block)], f"{name}.groups")
    peak = builder.value("ReduceMax", [builder.value("Abs", [groups], f"{name}.abs"), axis], f"{name}.max", keepdims=1)
    step = builder.value("Max", [builder.value("Mul", [peak, inverse], f"{name}.raw_step"), tiny], f"{name}.step")
    codes = builder.value("Round", [builder.value("Div", [groups, step], f"{name}.steps")], f"{name}.rounded_steps")
    rounded = builder.value("Mul", [codes, step], f"{name}.rounded")
    rest = builder.value("Sub", [groups, rounded], f"{name}.rest")
    both = builder.value("Concat", [rounded, rest], f"{name}.both", axis=axes - 2)
    product = multiply(builder.value("Reshape", [both, shape(*kept, inputs)], f"{name}.rows"), f"{name}.product")
    parts = builder.node("Split", [product], f"{name}.parts", outputs=2, axis=axes - 2, num_outputs=2).outputs
    return builder.value("Add", list(parts), f"{name}.sum", like)
