"""Types of values are filled in as ONNX Runtime knows them, and the CPU's kernels are those that it lists."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from satchel.export.checking.installed_kernels import cpu_kernels
from satchel.export.checking.value_types import INLINE, typed_model
from satchel.graphs.providers.findings import GraphView
from satchel.graphs.providers.kernels import Match
from satchel.runtime.ort.session import ORT_ERRORS

CONTRIB = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
g (float16[1, 2] x, float16[2] scale) => (y) {
    a = SimplifiedLayerNormalization(x, scale)
    b = com.microsoft.QuickGelu(a)
    c = Cast<to = 1>(b)
    y = Relu(c)
}"""


def test_an_operator_that_onnx_does_not_know_passes_its_type_on() -> None:
    model = typed_model(onnx.parser.parse_model(CONTRIB))
    found = {value.name: value.dtype for node in model.graph for value in node.outputs}
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    assert found == {"a": half, "b": half, "c": single, "y": single}


def test_types_from_elsewhere_are_taken() -> None:
    text = CONTRIB.replace("com.microsoft.QuickGelu", "com.microsoft.NoSuchOperator")
    known = [onnx.helper.make_tensor_value_info("b", onnx.TensorProto.INT8, None)]
    for given, dtype in (([], None), (known, ir.DataType.INT8)):
        model = typed_model(onnx.parser.parse_model(text), given)
        assert next(value.dtype for node in model.graph for value in node.outputs if value.name == "b") == dtype


def test_large_constants_lose_their_values_and_keep_their_size() -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1024])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 512])
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1024, 512], bytes(4 * 1024 * 512), raw=True)
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    assert proto.ByteSize() > INLINE
    model = typed_model(proto)
    assert proto.ByteSize() < INLINE
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.nbytes == 4 * 1024 * 512


NODES = [
    ("Where", "(bool[2] c, {0}[2] a, {0}[2] b) => ({0}[2] y) {{ y = Where(c, a, b) }}"),
    ("MatMul", "({0}[2, 2] a, {0}[2, 2] b) => ({0}[2, 2] y) {{ y = MatMul(a, b) }}"),
    ("Relu", "({0}[2] a) => ({0}[2] y) {{ y = Relu(a) }}"),
    ("CumSum", "({0}[2] a) => ({0}[2] y) <int64 axis = {{0}}> {{ y = CumSum(a, axis) }}"),
]


@pytest.mark.parametrize("dtype", ["float", "double", "int8", "int32", "int64", "uint16", "bfloat16"])
@pytest.mark.parametrize(("operator", "text"), NODES)
def test_the_table_agrees_with_what_onnx_runtime_opens(operator: str, text: str, dtype: str) -> None:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text.format(dtype)}')
    view = GraphView(typed_model(onnx.ModelProto.FromString(proto.SerializeToString())), kernels=cpu_kernels())
    fits = [fit.match for fit in view.fits.values()]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    opens = True
    try:
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS:
        opens = False
    assert fits == [Match.FITS if opens else Match.NO_TYPE]
