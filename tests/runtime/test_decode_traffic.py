"""Bytes that a decode step reads, counted on graphs whose weights are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from support.tiny_bundle import HIDDEN, KV_HEADS, LAYERS, VOCABULARY

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.bench.decode_traffic import weight_bytes

FLOAT = 4  # bytes
SIZES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.INT8: 1}


def weight(name: str, dims: Sequence[int], offset: int, kind: int = TensorProto.FLOAT) -> onnx.TensorProto:
    """An initializer whose data lies in weights.bin, which is not there."""
    tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    length = SIZES[kind]
    for size in dims:
        length *= size
    for key, value in (("location", "weights.bin"), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def bundle_of(tiny: Path, folder: Path, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto]) -> Bundle:
    """The tiny bundle with another decode graph."""
    graph = helper.make_graph(nodes, "g", [], [], weights)
    (folder / "decode.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    return dataclasses.replace(open_bundle(tiny), folder=folder)


def test_a_table_that_is_only_looked_up_is_left_out(tiny: Path) -> None:
    projections = LAYERS * HIDDEN * (HIDDEN + 2 * KV_HEADS * 16 + HIDDEN)
    expected = projections + HIDDEN * VOCABULARY + HIDDEN  # the head and the gain; no embedding, no rotary angles
    assert weight_bytes(open_bundle(tiny)) == expected * FLOAT


def test_a_table_that_is_the_head_too_counts_once(tiny: Path, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("GatherBlockQuantized", ["rows", "ids", "scales"], ["x"], domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["x", "blocks", "scales"], ["y"], domain="com.microsoft", K=7, N=11),
    ]
    same = [weight("rows", [11, 6], 64, TensorProto.INT8), weight("blocks", [11, 3, 2], 64, TensorProto.INT8)]
    assert (
        weight_bytes(bundle_of(tiny, tmp_path, nodes, [*same, weight("scales", [11, 3], 512)])) == 11 * 6 + 33 * FLOAT
    )


def test_a_weight_that_two_products_read_counts_once(tiny: Path, tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", [name, "w"], [f"{name}.out"]) for name in ("a", "b")]
    assert weight_bytes(bundle_of(tiny, tmp_path, nodes, [weight("w", [3, 5], 0)])) == 15 * FLOAT


def test_float16_weights_count_as_the_float32_that_they_become(tiny: Path, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w32"], ["y"]),
    ]
    weights = [weight("table", [13, 3], 0, TensorProto.FLOAT16), weight("w", [3, 5], 4096, TensorProto.FLOAT16)]
    assert weight_bytes(bundle_of(tiny, tmp_path, nodes, weights)) == 15 * FLOAT


@pytest.mark.parametrize(("rows", "experts"), [(1, 2), (3, 6), (4, 7)])
def test_experts_count_as_far_as_rows_can_choose_them(tiny: Path, tmp_path: Path, rows: int, experts: int) -> None:
    nodes = [helper.make_node("MoE", ["x", "router", "up", "", "down"], ["y"], domain="com.microsoft", k=2)]
    weights = [weight("up", [7, 3, 5], 0), weight("down", [7, 5, 3], 4096)]
    assert weight_bytes(bundle_of(tiny, tmp_path, nodes, weights), rows) == experts * 30 * FLOAT


def test_a_graph_that_makes_no_sense_is_an_error(tiny: Path, tmp_path: Path) -> None:
    bundle = dataclasses.replace(open_bundle(tiny), folder=tmp_path)
    with pytest.raises(BundleError, match=r"decode.onnx: cannot be read"):
        weight_bytes(bundle)
    (tmp_path / "decode.onnx").write_bytes(b"\x3a\x05abc")
    with pytest.raises(BundleError, match=r"decode.onnx: cannot be read .* export the bundle again"):
        weight_bytes(bundle)
