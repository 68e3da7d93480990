"""What graphs without varying dimensions share: their inputs beside token ids and caches, declared here once.

The runner's side of it is `STATIC_INPUTS` in satchel.runtime.bundle.contract.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from satchel.graphs.ir.weights import LazyWeight, cast

CACHE_ROWS, CACHE_INDEX, LAST_TOKEN = "cache_rows", "cache_index", "last_token"
TABLE = "table"
"""Mark (`meta`) of an input that has one row for each token: the `LazyWeight` that the rows are taken from."""

WINDOW = "window"
"""Mark (`meta`) of a mask: the window of the layers that read it, 0 for none."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The numbers that stand for the dimensions `sequence` and `capacity`."""

    tokens: int
    capacity: int


def static_input(model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """The graph's input of that name, added where it is not there yet.

    Raises:
        ValueError: It is there with another type or shape.
    """
    for value in model.graph.inputs:
        if value.name == name:
            if value.dtype != dtype or value.shape is None or value.shape.dims != shape:
                raise ValueError(f"an input called {name} is there already, {value.dtype} {value.shape}")
            return value
    value = ir.val(name, dtype, ir.Shape(shape))
    model.graph.inputs.append(value)
    return value


def table_of(value: ir.Value) -> LazyWeight | None:
    """The table whose rows an input takes, in the input's type, or None."""
    found = value.meta.get(TABLE)
    if not isinstance(found, LazyWeight) or value.dtype is None:
        return None
    if found.dtype == value.dtype:
        return found
    return cast(found, value.dtype, f"{found.name}.{value.dtype.name.lower()}")
