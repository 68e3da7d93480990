"""Small graphs for the rules of execution providers, written in ONNX's own notation."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from satchel.graphs.providers.findings import GraphView
from satchel.graphs.providers.kernels import KernelTable

ATTEND = """qs = Reshape(query, heads)
    ks = Reshape(key, heads)
    qt = Transpose<perm = [0, 2, 1, 3]>(qs)
    kt = Transpose<perm = [0, 2, 1, 3]>(ks)
    present = WRITE
    turned = Transpose<perm = [0, 1, 3, 2]>(present)
    scores = MatMul(qt, turned)
    masked = Add(scores, mask)
    weights = Softmax<axis = -1>(masked)
    mixed = MatMul(weights, present)
    back = Transpose<perm = [0, 2, 1, 3]>(mixed)
    merged = Reshape(back, flat)
    logits = MatMul(merged, head)"""
"""One layer's attention over a cache that WRITE writes, for a graph with `query`, `key` and what else it reads."""


def view(
    text: str,
    *,
    opset: int = 17,
    ir_version: int = 8,
    phase: str = "prefill",
    kernels: KernelTable | None = None,
    libraries: frozenset[str] = frozenset(),
) -> GraphView:
    """A graph as rules see it, with the types and shapes that ONNX infers; nodes are called n0, n1, ...

    `text` is "name (inputs) => (outputs) <constants> { nodes }". The constant {0} stands for zeros of its shape.
    """
    domains = ["com.microsoft"] if "com.microsoft." in text else []
    imported = "".join(f', "{domain}": 1' for domain in (*domains, *libraries))
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}{imported}]>'
    proto = onnx.parser.parse_model(f"{header} {text}")
    for tensor in proto.graph.initializer:
        if tensor.float_data == [0] or tensor.int32_data == [0]:
            zeros = np.zeros(tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, tensor.name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    return GraphView(model, phase, kernels, libraries)
