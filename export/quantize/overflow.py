"""Finds the values of a graph that float16 does not hold, for devices that round every value to it.

The CPU provider computes float16 nodes in float32 and does not round between them, so a bundle that runs there proves
nothing about them. Here each value is computed in float32 over windows of text, and its largest entry is compared with
the largest of float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.export.quantize.flow import Flow
from satchel.graphs.analysis.element_types import element_types
from satchel.graphs.analysis.float32_islands import ADVICE, LARGEST, float32_islands, write_too_large
from satchel.graphs.ir.values import weight
from satchel.graphs.passes.float16.store_float16 import halved
from satchel.graphs.quant.assign import rule_of
from satchel.runtime.bundle.contract import LOGITS

LIMIT = LARGEST / 2
"""Half of float16's largest number: another text may reach twice the values of this one."""

SHOWN = 8
"""How many values a warning names."""

MASKED = 1e30
"""Numbers of this size are a mask's lowest, which float16's lowest stands for."""


def find_too_large(model: ir.Model, windows: NDArray[np.int64], folder: Path) -> None:
    """Mark the values of a graph that float16 does not hold; `too_large` then lists them.

    Args:
        model: The float32 graph that all phases share.
        windows: Token ids [windows, length] of the text.
        folder: An empty folder for the run.

    Raises:
        PassError: A weight itself is beyond float16, the likely reason of such values.
    """
    types = element_types(model)
    kept = float32_islands(model, types)
    outputs = [value for node in model.graph if node not in kept for value in node.outputs]
    names = {str(value.name) for value in outputs if types.get(value) == ir.DataType.FLOAT and value.name != LOGITS}
    sizes: dict[str, float] = {}

    def observe(name: str, array: NDArray[Any]) -> None:
        magnitudes = np.abs(array[np.abs(array) < MASKED])
        sizes[name] = max(sizes.get(name, 0.0), float(magnitudes.max(initial=0.0)))

    Flow(model, windows, folder).run(observe=observe, observed=names)
    found = {name: size for name, size in sizes.items() if size > LIMIT}
    if found:
        for lazy in map(weight, model.graph.initializers.values()):
            if lazy is not None and lazy.dtype == ir.DataType.FLOAT and rule_of(lazy) is None:
                halved(lazy, ADVICE).numpy()
    write_too_large(model, found)


def overflow_warnings(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """What an export says about the values that float16 does not hold, `after` those that it did not scale down."""
    found = {"scaled down": {name: before[name] for name in before if name not in after}, "kept in float32": after}
    return [f"{what}, as float16 ends at 65504: {_listed(sizes)}" for what, sizes in found.items() if sizes]


def _listed(sizes: dict[str, float]) -> str:
    listed = ", ".join(f"{name} (up to {size:.3g})" for name, size in list(sizes.items())[:SHOWN])
    return listed + (f" and {len(sizes) - SHOWN} more" if len(sizes) > SHOWN else "")
