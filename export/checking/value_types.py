"""Infers the types of the values in a graph, so that rules can look up their kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from satchel.export.checking.installed_kernels import schemas
from satchel.graphs.providers.kernels import Formal, Signature, operator_key, type_name

DTYPES = {type_name(dtype): dtype for dtype in ir.DataType}
INLINE = 1 << 20
"""Constants of more bytes lose their values: rules only read shapes and types."""

UNREAD = "unread"
"""The external file name of such a constant; it is never opened."""


def typed_model(proto: onnx.ModelProto, known: Iterable[onnx.ValueInfoProto] = ()) -> ir.Model:
    """A model with the types of all values that can be inferred.

    Types come from the file, from ONNX's shape inference, and, for operators unknown to ONNX, from their signatures: an
    output that shares a type variable with an input has its type.

    Args:
        proto: The model; its large constants lose their values.
        known: Further types, of values whose type is not in the model.
    """
    _hollow(proto)
    there = {value.name for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)}
    proto.graph.value_info.extend(value for value in known if value.name not in there)
    # If inference fails, types may still follow from signatures.
    with contextlib.suppress(onnx.shape_inference.InferenceError, DecodeError, EncodeError):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    model = ir.from_proto(proto)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        _pass_on_types(node, model.graph.opset_imports.get(node.domain, 1))
    return model


def _hollow(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() > INLINE:
            kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            kept.data_location = onnx.TensorProto.EXTERNAL
            kept.external_data.add(key="location", value=UNREAD)
            tensor.CopyFrom(kept)


def _pass_on_types(node: ir.Node, opset: int) -> None:
    """Set the output types of a node that follow from its inputs and its signature."""
    if all(value.dtype is not None for value in node.outputs):
        return
    versions = schemas().get(operator_key(node.domain, node.op_type), {})
    version = max((version for version in versions if version <= opset), default=None)
    if version is None:
        return
    types = _bound(node, versions[version])
    for index, value in enumerate(node.outputs):
        formal = _formal(versions[version].outputs, index)
        dtype = None if formal is None else types.get(formal.type) or DTYPES.get(formal.type)
        if value.dtype is None and dtype is not None:
            value.dtype = dtype


def _bound(node: ir.Node, signature: Signature) -> dict[str, ir.DataType]:
    """The element types of the type variables that inputs bind."""
    types: dict[str, ir.DataType] = {}
    for index, value in enumerate(node.inputs):
        formal = _formal(signature.inputs, index)
        if value is not None and formal is not None and value.dtype is not None:
            types.setdefault(formal.type, value.dtype)
    return types


def _formal(formals: tuple[Formal, ...], index: int) -> Formal | None:
    """The parameter at an index; the last one may be variadic."""
    return formals[min(index, len(formals) - 1)] if formals else None
