"""Graphs may point at files of their bundle only, from their own initializers only, and inside those files."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from satchel.runtime.bundle.external_data import check_external_data
from satchel.runtime.errors import BundleError

SIZES = {"weights.bin": 100, "sub/more.bin": 8}


def outside(name: str = "w", **entries: object) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(initializers: list[TensorProto], nodes: list[onnx.NodeProto] | None = None) -> bytes:
    graph = helper.make_graph(nodes or [], "g", [], [], initializer=initializers)
    return helper.make_model(graph).SerializeToString()


def constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor)


GOOD = outside(location="weights.bin", offset=92, length=8)


def test_data_in_files_of_the_bundle_is_allowed() -> None:
    inside = helper.make_tensor("location", TensorProto.FLOAT, [2], [1, 2])  # named like the key
    named = helper.make_node("Identity", ["location"], ["y"], name="location", doc="location")
    for tensors in ([], [inside], [GOOD], [GOOD, outside("v", location="sub/more.bin"), inside]):
        check_external_data(model(tensors, [named, constant(inside)]), SIZES, "graph")


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../weights.bin", "other.bin", "./weights.bin", "sub/../weights.bin", "", "*/_ORT_MEM_ADDR_/*"],
)
def test_data_elsewhere_is_refused(location: str) -> None:
    content = model([GOOD, outside("v", location=location, offset=0, length=8)])
    with pytest.raises(BundleError, match=r"graph: the data of 'v' is in '.*', which is not part of the bundle"):
        check_external_data(content, SIZES, "graph")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": 93, "length": 8}, "beyond the end of weights.bin"),
        ({"offset": 101}, "beyond the end of weights.bin"),
        ({"offset": 1 << 62, "length": 1 << 62}, "beyond the end of weights.bin"),
        ({"offset": -4, "length": 8}, "not an ONNX graph.*'-4'"),
        ({"offset": "٣", "length": 8}, "is not an offset"),
        ({"offset": "1e3"}, "is not an offset"),
        ({"offset": "9" * 5000}, "is not an offset"),
    ],
)
def test_data_beyond_a_file_is_refused(entries: dict[str, object], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_external_data(model([outside(location="weights.bin", **entries)]), SIZES, "graph")


def test_a_key_that_comes_twice_is_refused() -> None:
    tensor = outside(location="weights.bin", offset=0, length=8)
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(BundleError, match="duplicate key 'location'"):
        check_external_data(model([tensor]), SIZES, "graph")


def test_data_of_anything_but_an_initializer_is_refused() -> None:
    inner = helper.make_graph([constant(GOOD)], "inner", [], [])
    loop = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    tensors = helper.make_node("Constant", [], ["c"])
    tensors.attribute.add(name="values", type=onnx.AttributeProto.TENSORS, tensors=[GOOD])
    nested = helper.make_graph([], "inner", [], [], initializer=[GOOD])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=nested, else_branch=nested)
    sparse = helper.make_model(helper.make_graph([], "g", [], []))
    sparse.graph.sparse_initializer.add().values.CopyFrom(GOOD)
    function = helper.make_model(helper.make_graph([], "g", [], []))
    function.functions.add(name="f").node.append(constant(GOOD))
    for content in (
        *(model([GOOD], [node]) for node in (constant(GOOD), loop, tensors, branch)),
        sparse.SerializeToString(),
        function.SerializeToString(),
    ):
        with pytest.raises(BundleError, match="external data outside the initializers"):
            check_external_data(content, SIZES, "graph")


def test_two_initializers_of_one_name_are_both_looked_at() -> None:
    for pair in ([GOOD, outside(location="/etc/passwd")], [outside(location="/etc/passwd"), GOOD]):
        with pytest.raises(BundleError):
            check_external_data(model(pair), SIZES, "graph")


@pytest.mark.parametrize("content", [b"", b"\xff", b"\x3a\xff\xff", b"no graph at all"])
def test_bytes_that_are_no_graph_are_refused_or_hold_nothing(content: bytes) -> None:
    if content:
        with pytest.raises(BundleError, match="not an ONNX graph"):
            check_external_data(content, SIZES, "graph")
    else:
        check_external_data(content, SIZES, "graph")
