"""Parts of a tensor that the tracer hands out through a sequence come from Split."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import Builder, attributes, constant, dims, nodes, replace


@graph_pass
def normalize_splits(model: ir.Model, report: Report) -> None:
    """Write SplitToSequence, whose parts are read by number, as Split.

    before: x [batch, sequence, 96] -> SplitToSequence(64, axis=-1) -> SequenceAt(0) -> a, SequenceAt(1) -> b
    after:  x -> Split([64, 32], axis=-1) -> a, b
    refuses when: the axis has no known size, the parts' sizes or numbers are computed, or an attribute is not known.
    """
    for node in nodes(model, "SplitToSequence"):
        with report.refusing(node):
            _rewrite(model, node)
            report.count += 1


def _rewrite(model: ir.Model, node: ir.Node) -> None:
    axis = int(attributes(node, axis=0, keepdims=1)["axis"])
    sizes = _sizes(node, axis)
    readers = [use.node for use in node.outputs[0].uses()]
    parts = [constant(reader.inputs[1]) if reader.op_type == "SequenceAt" else None for reader in readers]
    if node.outputs[0].is_graph_output() or any(part is None for part in parts):
        raise Refused("its parts are not read by numbers that are known")
    builder = Builder(model, node)
    lengths = builder.constant(np.asarray(sizes, np.int64), "split." + "_".join(map(str, sizes)))
    split = builder.node("Split", [node.inputs[0], lengths], f"{node.name}.parts", outputs=len(sizes), axis=axis)
    for reader, part in zip(readers, parts, strict=True):
        if part is not None:
            replace(reader.outputs[0], split.outputs[int(part.reshape(()))])


def _sizes(node: ir.Node, axis: int) -> list[int]:
    """The parts' sizes; one number means parts of that size, the last one smaller where they do not divide."""
    shape = dims(node.inputs[0])
    whole = shape[axis] if shape is not None else None
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if not isinstance(whole, int) or given is None:
        raise Refused("the size of the axis, or of the parts, is not known")
    if given.ndim:
        return [int(size) for size in given]
    step = int(given)
    return [min(step, whole - start) for start in range(0, whole, step)]
