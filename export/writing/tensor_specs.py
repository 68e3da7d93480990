"""Converts graph inputs and outputs to their manifest entries."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from satchel.export.errors import ExportError
from satchel.runtime.bundle.dtypes import BY_ONNX, DTYPES
from satchel.runtime.bundle.graph_specs import TensorSpec


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Return the manifest entries of graph inputs or outputs.

    Raises:
        ExportError: A shape is unknown or a type is unexpected.
    """
    specs = []
    for value in values:
        dtype = None if value.dtype is None else BY_ONNX.get(value.dtype.value)
        if value.shape is None or dtype is None or dtype.name not in DTYPES:
            raise ExportError(
                f"the graph's {value.name} has no shape or an unexpected type {value.dtype}: "
                "report this model to satchel"
            )
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape.dims)
        specs.append(TensorSpec(str(value.name), dtype.name, shape))
    return tuple(specs)
