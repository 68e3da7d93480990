"""Inputs and outputs of a graph as the manifest declares them."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from satchel.export.errors import ExportError
from satchel.runtime.bundle.manifest import TensorSpec

DTYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT8: "int8",
    ir.DataType.BOOL: "bool",
}


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Graph inputs or outputs as the manifest declares them.

    Raises:
        ExportError: A shape or type is not known.
    """
    specs = []
    for value in values:
        if value.shape is None or value.dtype not in DTYPE_NAMES:
            raise ExportError(
                f"the graph's {value.name} has no shape or an unexpected type {value.dtype}: "
                "report this model to satchel"
            )
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape.dims)
        specs.append(TensorSpec(str(value.name), DTYPE_NAMES[value.dtype], shape))
    return tuple(specs)
