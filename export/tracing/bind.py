"""Gives the initializers of a traced graph their values, lazily: from the checkpoint or from the trace itself."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from satchel.export.errors import ExportError
from satchel.export.tracing.trace import Trace
from satchel.graphs.ir.sweep import sweep
from satchel.graphs.ir.weights import LazyWeight, from_array

PREFIX = "module."
"""What the tracer's wrapper puts in front of each name."""


def bind(trace: Trace, weights: Mapping[str, LazyWeight], name: str) -> ir.Model:
    """Return the traced model with a value for every initializer that is read.

    Args:
        trace: The traced graph.
        weights: The checkpoint's tensors by parameter name.
        name: What to call the checkpoint in messages.

    Raises:
        ExportError: A tensor is in neither place, or its shape is not the module's.
    """
    model = trace.model
    sweep(model.graph)
    for value in list(model.graph.initializers.values()):
        key = str(value.name).removeprefix(PREFIX)
        if not str(value.name).startswith(PREFIX) and value.const_value is not None:
            continue
        lazy = weights.get(key)
        if lazy is None and key in trace.constants:
            lazy = from_array(key, trace.constants[key], computed=True)
        if lazy is None:
            raise ExportError(f"{name}: the model reads the tensor {key}, which the checkpoint does not hold")
        wanted = tuple(value.shape.numpy()) if value.shape is not None else lazy.dims
        if lazy.dims != wanted:
            raise ExportError(f"{name}: tensor {key} is {list(lazy.dims)}, and the model wants {list(wanted)}")
        model.graph.initializers.pop(str(value.name))
        value.name = key
        value.const_value = LazyWeight(key, lazy.dims, lazy.dtype, lazy.rows, lazy.columns, computed=lazy.computed)
        value.dtype = lazy.dtype
        model.graph.initializers[key] = value
    return model
