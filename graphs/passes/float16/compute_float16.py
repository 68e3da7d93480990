"""A float32 graph computes in float16."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.element_types import element_types
from satchel.graphs.analysis.float32_islands import ADVICE, float32_islands
from satchel.graphs.ir.contract import PassError, Report, graph_pass
from satchel.graphs.ir.sweep import sweep
from satchel.graphs.ir.values import MICROSOFT, Builder, replace, weight
from satchel.graphs.passes.float16.store_float16 import halved
from satchel.runtime.bundle.contract import LOGITS

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
FLOAT32_INPUTS = {(MICROSOFT, "GroupQueryAttention"): {12, 13}}
"""Inputs that are float32 whatever else is: the scales of an int8 cache."""
INT8_ACTIVATIONS = {"DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear"}


@graph_pass
def compute_float16(model: ir.Model, report: Report) -> None:
    """Compute in float16: weights, caches, the residual stream and all between them. Norms that are written as
    arithmetic, rotary angles and what follows the head's linear layer stay in float32, with a Cast on each side; the
    logits are float32. Norms in one operator sum in float32 themselves. Numbers in the graph that are beyond float16
    become its largest, and those too small for it its smallest: a mask's lowest number stays its lowest, and an
    epsilon does not become 0.

    before: x, W float32 -> MatMul -> y float32            x -> Pow -> ReduceMean ... -> Mul(x) -> y float32
    after:  x, W float16 -> MatMul -> y float16            x -> Cast -> Pow -> ReduceMean ... -> Mul(.) -> Cast -> y
    refuses when: activations are in 8 bits, whose linear layers are float32 (an error, as the graph would be of two
    minds). Writing fails if a weight is beyond float16's largest, 65,504.
    """
    _Half(model, report).run()
    if report.count:
        sweep(model.graph)


class _Half:
    """Walks the graph once, in its order, and retypes it."""

    def __init__(self, model: ir.Model, report: Report) -> None:
        self.model, self.report = model, report
        self.types = element_types(model)
        self.kept = float32_islands(model, self.types)
        self.casts: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for value in self.model.graph.inputs:
            if value.dtype == FLOAT:
                self._retype(value)
        for node in list(self.model.graph):
            if node.op_type in INT8_ACTIVATIONS:
                raise PassError(f"{node.name} ({node.op_type}) takes activations in 8 bits, which float16 does not")
            self._node(node)
        for output in list(self.model.graph.outputs):
            if output.name == LOGITS and self.types[output] == HALF:
                self._widen_logits(output)
        if self.report.count:
            self._say_types()

    def _retype(self, value: ir.Value) -> None:
        # A new type object: the clone shares those of the model that it was made from.
        value.type = ir.TensorType(HALF)
        self.types[value] = HALF
        self.report.count += 1

    def _say_types(self) -> None:
        """Write down all types that are known: whether a device has a kernel for a node depends on them."""
        for value, dtype in self.types.items():
            if value.type is None and dtype is not None:
                value.type = ir.TensorType(dtype)

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "Cast":
            self._cast(node)
            return
        inside = node in self.kept
        float32 = FLOAT32_INPUTS.get((node.domain, node.op_type), set())
        for index, value in enumerate(node.inputs):
            if value is None or self.types.get(value) not in (FLOAT, HALF):
                continue
            wanted = FLOAT if inside or index in float32 else HALF
            # An operator in float32 that reads a weight which is in float16 already has a Cast of its own.
            if self.types[value] != wanted:
                node.replace_input_with(index, self._as(node, value, wanted))
        if inside:
            return
        if node.op_type in ("Constant", "ConstantOfShape"):
            self._attribute(node)
        for output in node.outputs:
            if self.types.get(output) == FLOAT:
                self._retype(output)

    def _cast(self, node: ir.Node) -> None:
        """A Cast to float32 becomes one to float16, or is taken out where its input is that already."""
        source, output = node.inputs[0], node.outputs[0]
        if node in self.kept or self.types[output] != FLOAT or source is None:
            return
        node.attributes.add(ir.AttrInt64("to", HALF.value))
        self._retype(output)
        if self.types.get(source) == HALF and not output.is_graph_output():
            ir.convenience.replace_all_uses_with(output, source)

    def _attribute(self, node: ir.Node) -> None:
        """Round the number of a Constant or ConstantOfShape."""
        if self.types.get(node.outputs[0]) != FLOAT:
            return
        if "value" in node.attributes:
            array = node.attributes["value"].as_tensor().numpy()
        else:
            given = node.attributes.get("value_float") or node.attributes.get("value_floats")
            array = np.asarray([0.0] if given is None else given.value, np.float32)
            node.attributes.clear()
        node.attributes.add(ir.AttrTensor("value", ir.tensor(_half(array))))

    def _as(self, node: ir.Node, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The value in the other type, made once: a float16 initializer, or a Cast in front of the first reader."""
        there = self.casts.get(value)
        if there is None:
            there = self.casts[value] = self._made(node, value, wanted)
            self.types[there] = wanted
            self.report.count += 1
        return there

    def _made(self, node: ir.Node, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        builder, lazy = Builder(self.model, node), weight(value)
        if lazy is not None and wanted == HALF:
            return builder.initializer(halved(lazy, ADVICE))
        if value.const_value is not None and wanted == HALF:
            return builder.initializer(ir.tensor(_half(value.const_value.numpy()), name=f"{value.name}.fp16"))
        cast = builder.value("Cast", [value], f"{value.name}.{wanted.name.lower()}", to=wanted)
        cast.shape, cast.type = value.shape, ir.TensorType(wanted)
        return cast

    def _widen_logits(self, logits: ir.Value) -> None:
        cast = Builder(self.model).value("Cast", [logits], f"{logits.name}.float32", to=FLOAT)
        cast.shape, cast.type = logits.shape, ir.TensorType(FLOAT)
        half = logits.type
        replace(logits, cast)
        cast.producer().replace_input_with(0, logits)  # type: ignore[union-attr]
        logits.type = half
        self.report.count += 1


def _half(array: np.ndarray) -> np.ndarray:
    """Numbers of a graph in float16: no finite one becomes infinite, and none but 0 becomes 0."""
    limits = np.finfo(np.float16)
    with np.errstate(over="ignore", under="ignore"):
        half = array.astype(np.float16)
    half = np.where(np.isinf(half) & np.isfinite(array), np.sign(array) * limits.max, half)
    half = np.where((half == 0) & (array != 0), np.sign(array) * limits.smallest_subnormal, half)
    return np.asarray(half, np.float16)
