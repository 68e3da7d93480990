"""ONNX Runtime's operators for several ranks, as its source defines them, and all ranks' graphs joined into one.

No wheel of ONNX Runtime has the operators. In the joined graph a Sum of all ranks' values stands for each AllReduce,
and a Concat for each AllGather: what is between them is what each rank runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from satchel.runtime.bundle.manifest import Manifest

Arrays = dict[str, NDArray[np.generic]]


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of the domain com.microsoft, version 1.

    Attributes:
        attributes: Its attributes with their defaults, all integers.
        types: What its inputs and outputs may be; all are of one type.
    """

    attributes: dict[str, int]
    types: frozenset[ir.DataType]


REAL = frozenset({ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE})
OPERATORS = {
    "AllReduce": Operator({}, REAL),
    "AllGather": Operator({"axis": 1, "group_size": 1}, REAL | {ir.DataType.INT64, ir.DataType.BOOL}),
}


def collectives(model: ir.Model) -> list[ir.Node]:
    """The nodes by which ranks exchange numbers, in the graph's order."""
    return [node for node in model.graph if node.domain == "com.microsoft" and node.op_type in OPERATORS]


def faults(node: ir.Node, ranks: int) -> list[str]:
    """What is wrong with such a node, by the operator's definition and by what its kernel does with its inputs."""
    known, (x, y) = OPERATORS[node.op_type], (node.inputs[0], node.outputs[0])
    found = [f"attribute {name}" for name in node.attributes if name not in known.attributes]
    if len(node.inputs) != 1 or len(node.outputs) != 1:
        found.append("its kernel takes the first input only")
    if x is None or x.dtype is None or x.dtype not in known.types or x.dtype != y.dtype:
        found.append("types")
    before, after = list((x.shape if x is not None else None) or ()), list(y.shape or ())
    if node.op_type == "AllGather":
        axis, count = (node.attributes.get_int(name, default) for name, default in known.attributes.items())
        if count != ranks or not 0 <= axis < len(before):
            found.append("its axis is not one of its input's, or its ranks are not all")
        elif not isinstance(before[axis], int):
            found.append("its width is not known")
        else:
            before[axis] = before[axis] * ranks
    return found if before and before == after else [*found, f"shapes {before} {after}"]


def depends(later: ir.Node, earlier: ir.Node) -> bool:
    """Whether a node needs what another one computes."""
    seen, waiting = set[ir.Node](), [later]
    while waiting:
        for value in waiting.pop().inputs:
            maker = None if value is None else value.producer()
            if maker is earlier:
                return True
            if maker is not None and maker not in seen:
                seen.add(maker)
                waiting.append(maker)
    return False


class Joined:
    """A graph of all ranks in one session, in float32, and their caches."""

    def __init__(self, folders: Sequence[Path], phase: str) -> None:
        """`folders` are those of the ranks, in order; one of a whole bundle is a single rank."""
        models = [_in_float32(onnx.load(folder / f"{phase}.onnx")) for folder in folders]
        outputs = {output.name for output in models[0].graph.output}
        for rank, model in enumerate(models):
            _prefix(model.graph, f"{rank}/")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(
            _joined(models).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._ranks, self._outputs = len(models), outputs
        self._layers = [Manifest.read(folder / "manifest.json").kv_cache for folder in folders]

    def empty(self, capacity: int) -> Arrays:
        """Keys and values of zeros, by the names of the joined graph's inputs."""
        return {
            f"{rank}/{name}": np.zeros((1, layer.kv_heads, capacity, width), _wide(cache.dtype))
            for rank, cache in enumerate(self._layers)
            for layer in cache.layers
            for name, _, width in layer.buffers
        }

    def run(self, ids: NDArray[np.int64], length: int, cache: Arrays, capacity: int = 0) -> tuple[list[Arrays], Arrays]:
        """The outputs of each rank, and the caches after `ids`, up to `length` positions.

        With a `capacity` the mask is as long."""
        mask = (np.arange(capacity or length) < length).astype(np.int64)[None]
        names = [output.name for output in self._session.get_outputs()]
        feeds = {"input_ids": ids[None], "attention_mask": mask, **cache}
        known = {each.name for each in self._session.get_inputs()}
        found = dict(zip(names, self._session.run(names, {k: v for k, v in feeds.items() if k in known}), strict=True))
        after = {
            f"{rank}/{past}": found.pop(f"{rank}/{present}")
            for rank, cache_of in enumerate(self._layers)
            for layer in cache_of.layers
            for past, present, _ in layer.buffers
        }
        gathered = [name for name in found if name.partition("/")[2] not in self._outputs]
        assert len({found.pop(name).shape for name in gathered}) <= 1, "AllGather takes as much from each rank"
        each = [
            {name.partition("/")[2]: found[name] for name in found if name.startswith(f"{rank}/")}
            for rank in range(self._ranks)
        ]
        return each, after


def _wide(dtype: str) -> str:
    return "float32" if dtype == "float16" else dtype


def _in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with all that is in float16 in float32, weights rounded as they are."""
    graph, half, single = model.graph, TensorProto.FLOAT16, TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type == half:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    for node in graph.node:
        for attribute in node.attribute:
            if (node.op_type, attribute.name, attribute.i) == ("Cast", "to", half):
                attribute.i = single
    return model


def _prefix(graph: onnx.GraphProto, prefix: str) -> None:
    shared = {"", "input_ids", "attention_mask"}
    for node in graph.node:
        node.name = prefix + node.name
        for names in (node.input, node.output):
            names[:] = [name if name in shared else prefix + name for name in names]
    for value in (*graph.initializer, *graph.input, *graph.output):
        value.name = value.name if value.name in shared else prefix + value.name


def _joined(models: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """One graph: the pieces of all ranks between two exchanges, the exchange, the next pieces."""
    pieces, exchanges = zip(*(_pieces(model.graph) for model in models), strict=True)
    whole = onnx.GraphProto(name="joined")
    for number, parts in enumerate(zip(*pieces, strict=True)):
        for part in parts:
            whole.node.extend(part)
        if number == len(exchanges[0]):
            break
        nodes = [each[number] for each in exchanges]
        assert len({(node.op_type, node.name.partition("/")[2]) for node in nodes}) == 1
        given, made = [node.input[0] for node in nodes], [node.output[0] for node in nodes]
        axis = {each.name: each.i for each in nodes[0].attribute if each.name == "axis"}
        whole.node.append(helper.make_node("Concat" if axis else "Sum", given, [made[0]], **axis))
        whole.node.extend(helper.make_node("Identity", [made[0]], [name]) for name in made[1:])
        whole.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in given if axis)
    for model in models:
        whole.initializer.extend(model.graph.initializer)
        whole.output.extend(model.graph.output)
        whole.input.extend(v for v in model.graph.input if v.name not in {each.name for each in whole.input})
    imports = [each for each in models[0].opset_import if each.domain != "satchel"]
    return helper.make_model(whole, opset_imports=imports, ir_version=models[0].ir_version)


def _pieces(graph: onnx.GraphProto) -> tuple[list[list[onnx.NodeProto]], list[onnx.NodeProto]]:
    pieces: list[list[onnx.NodeProto]] = [[]]
    exchanges = []
    for node in graph.node:
        if node.domain == "com.microsoft" and node.op_type in OPERATORS:
            exchanges.append(node)
            pieces.append([])
        else:
            pieces[-1].append(node)
    return pieces, exchanges
