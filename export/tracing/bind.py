"""Binds the initializers of a traced graph to lazy values from the checkpoint or the trace."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from satchel.export.errors import ExportError
from satchel.export.tracing.trace import Trace
from satchel.graphs.ir.low_rank import carry
from satchel.graphs.ir.sweep import sweep
from satchel.graphs.ir.weights import LazyWeight, from_array

PREFIX = "module."
"""The prefix of names in the tracer's wrapper module."""


def bind(trace: Trace, weights: Mapping[str, LazyWeight], name: str) -> ir.Model:
    """Return the traced model with a value for every initializer in use.

    Args:
        trace: The traced graph.
        weights: The checkpoint's tensors by parameter name.
        name: The checkpoint's name for messages.

    Raises:
        ExportError: A tensor is missing, or its shape differs from the module's.
    """
    model = trace.model
    sweep(model.graph)
    for value in list(model.graph.initializers.values()):
        key = str(value.name).removeprefix(PREFIX)
        if not (str(value.name).startswith(PREFIX) or key in trace.constants) and value.const_value is not None:
            continue
        lazy = weights.get(key)
        if lazy is None and key in trace.constants:
            lazy = from_array(key, trace.constants[key], computed=True)
        if lazy is None:
            raise ExportError(f"{name}: the model reads tensor {key}, which the checkpoint does not contain")
        wanted = tuple(value.shape.numpy()) if value.shape is not None else lazy.dims
        if lazy.dims != wanted:
            raise ExportError(f"{name}: tensor {key} has shape {list(lazy.dims)}, but the model expects {list(wanted)}")
        model.graph.initializers.pop(str(value.name))
        value.name = key
        bound = LazyWeight(key, lazy.dims, lazy.dtype, lazy.rows, lazy.columns, computed=lazy.computed)
        value.const_value = carry(bound, lazy, lambda change: change)
        value.dtype = lazy.dtype
        model.graph.initializers[key] = value
    return model
