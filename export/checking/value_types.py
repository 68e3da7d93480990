"""Fills in the types of a graph's values, so that rules can ask which kernels they have."""

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
"""Constants of more bytes lose their values: rules look at shapes and types alone."""

UNREAD = "unread"
"""The file name that such a constant gets; nobody opens it."""


def typed_model(proto: onnx.ModelProto, known: Iterable[onnx.ValueInfoProto] = ()) -> ir.Model:
    """A model with the type of every value that can be known.

    Types come from the file, from ONNX's own inference, and, for operators that ONNX does not know, from their
    signatures: an output that shares a type variable with an input has its type.

    Args:
        proto: The model; its large constants lose their values.
        known: Types of values from elsewhere, for those that it does not say itself.
    """
    _hollow(proto)
    there = {value.name for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)}
    proto.graph.value_info.extend(value for value in known if value.name not in there)
    # What inference would have known may still follow from signatures.
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
    """Give a node's outputs the types that its inputs and its signature decide."""
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
    """The element type of each type variable that an input binds."""
    types: dict[str, ir.DataType] = {}
    for index, value in enumerate(node.inputs):
        formal = _formal(signature.inputs, index)
        if value is not None and formal is not None and value.dtype is not None:
            types.setdefault(formal.type, value.dtype)
    return types


def _formal(formals: tuple[Formal, ...], index: int) -> Formal | None:
    """The parameter at an index; the last one may stand for several."""
    return formals[min(index, len(formals) - 1)] if formals else None
