"""External data entries of ONNX files, against the onnx package."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from satchel.runtime.bundle.onnx_wire import External, Node, external_data, map_external_data, nodes, replace_nodes


def model(entries: External) -> onnx.ModelProto:
    """A graph with an initializer of its own data and one whose data lies elsewhere."""
    inside = helper.make_tensor("inside", TensorProto.FLOAT, [2], [1.0, -2.0])
    outside = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[300])
    outside.data_location = TensorProto.EXTERNAL
    for key, text in entries.items():
        outside.external_data.add(key=key, value=text)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    node = helper.make_node("Neg", ["inside"], ["y"], alpha=0.5)  # a float attribute is a fixed32 field
    graph = helper.make_graph([node], "g", [], [output], [inside, outside])
    return helper.make_model(graph, doc_string="x" * 300)


ENTRIES = {"location": "weights.bin", "offset": "4096", "length": "1200"}


def test_entries_are_read_and_replaced_and_all_else_stays(tiny: Path) -> None:
    assert external_data(model(ENTRIES).SerializeToString()) == [ENTRIES]
    entries = {"location": "o" * 200, "offset": "0", "length": "1200", "prepacked_0": "MatMul+1|0;64;0"}
    changed = map_external_data(model(ENTRIES).SerializeToString(), lambda found: {**found, **entries})
    assert onnx.load_from_string(changed) == model(entries)
    original = (tiny / "decode.onnx").read_bytes()
    assert onnx.load_from_string(map_external_data(original, dict)) == onnx.load_from_string(original)


def test_nodes_are_read_and_replaced_and_all_else_stays(tiny: Path) -> None:
    original = (tiny / "decode.onnx").read_bytes()
    read = onnx.load_from_string(original)
    wanted = [(n.op_type, n.domain, n.name, tuple(n.input), tuple(n.output)) for n in read.graph.node]
    found = nodes(original)
    assert [(n.operator, n.domain, n.name, n.inputs, n.outputs) for n in found] == wanted
    old = found[2]
    new = Node("Transpose", "", "turned", (old.inputs[0],), old.outputs, {"perm": (1, 0, 300)})
    changed = onnx.load_from_string(replace_nodes(original, {old.outputs[0]: new}))
    read.graph.node[2].CopyFrom(
        helper.make_node("Transpose", [old.inputs[0]], list(old.outputs), "turned", domain="", perm=[1, 0, 300])
    )
    assert changed == read
    assert replace_nodes(original, {}) == original


@pytest.mark.parametrize("content", [b"\x3a\x05abc", b"\x3b", b"\xff" * 12], ids=["short", "group", "no number"])
def test_what_is_no_protobuf_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="byte"):
        external_data(content)
