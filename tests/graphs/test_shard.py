"""Cutting the graphs of a bundle: what each rank has of the weights, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.codes import rounded, values
from support.graphs import build, normal, run, serialized
from support.tiny_bundle import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCABULARY, write_bundle

from satchel.graphs.ir.sweep import sweep
from satchel.graphs.passes.quantize.insert_qdq import insert_qdq
from satchel.graphs.passes.quantize.quantize_linear import quantize_linear
from satchel.graphs.quant.recipe import Rule
from satchel.graphs.shard.collectives import Place
from satchel.graphs.shard.layers import Layered
from satchel.graphs.shard.pipeline import StageError, divide, weigh
from satchel.graphs.shard.products import Product, product_of
from satchel.graphs.shard.slices import NotCutError, Slicer, common_block, scaled, shifted, sliced, taken
from satchel.graphs.shard.tensor_parallel import _own_channels
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.ranks import rank_folder, read_ranks
from satchel.runtime.bundle.shares import stages
from satchel.runtime.cli.main import main


def cut(folder: Path, ranks: int, *flags: str, way: str = "tensor") -> Path:
    output = folder.with_name(f"{way}{ranks}")
    line = ["shard", str(folder), f"--{way}-parallel", str(ranks), "-o", str(output), "--quiet", *flags]
    assert main(line) == 0
    return output


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "whole")


def weights(folder: Path, graph: str = "prefill") -> dict[str, np.ndarray]:
    model = ir.load(folder / f"{graph}.onnx")
    return {
        str(value.name): value.const_value.numpy()
        for value in model.graph.initializers.values()
        if value.const_value is not None
    }


def test_heads_are_divided_by_output_and_input(whole: Path) -> None:
    output, expected = cut(whole, 2), weights(whole)
    parts = [weights(rank_folder(output, rank)) for rank in range(2)]
    for name, axis, width in (("q.0", 1, HIDDEN), ("k.0", 1, KV_HEADS * HEAD_DIM), ("o.1", 0, HIDDEN)):
        assert [part[name].shape[axis] for part in parts] == [width // 2] * 2
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], axis), expected[name])
    for name, axis in (("embed", 0), ("head", 1)):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], axis), expected[name])
    manifests = [Manifest.read(rank_folder(output, rank) / "manifest.json") for rank in range(2)]
    assert [{layer.kv_heads for layer in each.kv_cache.layers} for each in manifests] == [{1}, {1}]
    assert [each.rank is not None and each.rank.rank for each in manifests] == [0, 1]
    assert len(read_ranks(output).digests) == 2


def test_all_graphs_of_a_rank_share_its_weights(whole: Path) -> None:
    output = cut(whole, 2)
    sizes = [(rank_folder(output, rank) / "weights.bin").stat().st_size for rank in range(2)]
    assert sum(sizes) < 1.1 * (whole / "weights.bin").stat().st_size


def test_key_heads_are_replicated_where_ranks_are_more(whole: Path) -> None:
    output = cut(whole, HEADS)
    parts = [weights(rank_folder(output, rank)) for rank in range(HEADS)]
    assert [part["q.0"].shape[1] for part in parts] == [HEAD_DIM] * HEADS
    np.testing.assert_array_equal(parts[0]["k.0"], parts[1]["k.0"])
    assert not np.array_equal(parts[1]["k.0"], parts[2]["k.0"])


def test_sums_are_where_ranks_have_parts(whole: Path) -> None:
    model = ir.load(rank_folder(cut(whole, 2), 0) / "decode.onnx")
    kinds = [node.op_type for node in model.graph if node.domain == "satchel"]
    assert kinds == ["AllReduce"] * 3 + ["GatherLogits"], "the embedding, two layers of attention, and the head"


def test_the_same_cut_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    first = read_ranks(cut(whole, 2)).digests
    assert main(["shard", str(whole), "--tensor-parallel", "2", "-o", str(tmp_path / "again"), "--quiet"]) == 0
    assert read_ranks(tmp_path / "again").digests == first


@pytest.mark.parametrize(
    "flags", [["1"], ["2", "--shares", "1,1,1"], ["0"], ["-3"]], ids=["one rank", "shares", "none", "negative"]
)
def test_a_wrong_division_is_refused_and_nothing_written(whole: Path, tmp_path: Path, flags: list[str]) -> None:
    assert main(["shard", str(whole), "-o", str(tmp_path / "out"), "--tensor-parallel", *flags]) == 2
    assert not (tmp_path / "out").exists()


def test_a_stage_has_the_weights_and_caches_of_its_layers(whole: Path) -> None:
    output = cut(whole, 2, way="pipeline")
    parts = [weights(rank_folder(output, rank)) for rank in range(2)]
    assert {name for name in parts[0] if name not in parts[1]} >= {"embed", "q.0", "k.0", "v.0", "o.0"}
    assert {name for name in parts[1] if name not in parts[0]} >= {"head", "q.1", "k.1", "v.1", "o.1"}
    for rank, layer in enumerate((0, 1)):
        manifest = Manifest.read(rank_folder(output, rank) / "manifest.json")
        assert [each.past_key for each in manifest.kv_cache.layers] == [f"past_key_values.{layer}.key"]
        assert manifest.rank is not None
        assert (manifest.rank.layers, manifest.rank.stage, manifest.rank.part) == ((layer, layer + 1), rank, 0)
    assert [(each.first, each.end, each.ranks) for each in read_ranks(output).layout] == [(0, 1, (0,)), (1, 2, (1,))]
    sizes = [(rank_folder(output, rank) / "weights.bin").stat().st_size for rank in range(2)]
    assert sum(sizes) < 1.1 * (whole / "weights.bin").stat().st_size


def test_a_stage_sends_its_hidden_states_to_the_next(whole: Path) -> None:
    output = cut(whole, 2, way="pipeline")
    first, second = (ir.load(rank_folder(output, rank) / "decode.onnx") for rank in range(2))
    assert [node.op_type for node in first.graph if node.domain == "satchel"] == ["Send"]
    (received,) = (node for node in second.graph if node.domain == "satchel")
    assert (received.op_type, received.attributes.get_int("width", 0)) == ("Receive", HIDDEN)


def test_a_grid_has_parts_of_each_stage(whole: Path) -> None:
    output = cut(whole, 2, "--pipeline-parallel", "2")
    assert [each.ranks for each in read_ranks(output).layout] == [(0, 1), (2, 3)]
    shapes = [{n: a.shape for n, a in weights(rank_folder(output, rank)).items() if n[:2] == "q."} for rank in range(4)]
    assert shapes == [{"q.0": (HIDDEN, HIDDEN // 2)}] * 2 + [{"q.1": (HIDDEN, HIDDEN // 2)}] * 2


def test_shares_are_of_stages_where_only_these_are_given(whole: Path) -> None:
    models = {"prefill.onnx": ir.load(whole / "prefill.onnx")}
    assert [piece.layers for piece in weigh(models)] == [range(1), range(1, 2)]
    embedded, last = weigh(models)
    assert (embedded.bytes - embedded.read, last.bytes - last.read) == (4 * VOCABULARY * HIDDEN, 0)
    assert stages([1, 1, 1, 1], 2, shares=[3, 1]) == [range(3), range(3, 4)]
    assert stages([4, 1, 1, 1, 1, 1], 2, [0, 1, 1, 1, 1, 2]) == [range(3), range(3, 6)]


@pytest.mark.parametrize(
    "flags",
    [
        ["--pipeline-parallel", "3"],
        ["--pipeline-parallel", "1"],
        ["--pipeline-parallel", "2", "--shares", "1,1,1"],
        ["--tensor-parallel", "2", "--pipeline-parallel", "2", "--shares", "2,1"],
        ["--tensor-parallel", "1", "--pipeline-parallel", "1"],
        [],
    ],
    ids=["more stages than layers", "one", "shares", "shares of a grid", "one of both", "nothing"],
)
def test_wrong_stages_are_refused_and_nothing_written(whole: Path, tmp_path: Path, flags: list[str]) -> None:
    assert main(["shard", str(whole), "-o", str(tmp_path / "out"), *flags]) == 2
    assert not (tmp_path / "out").exists()


def test_layers_that_share_keys_stay_together(whole: Path) -> None:
    model = ir.load(whole / "decode.onnx")
    first, second = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert Layered(model).border(1) is not None
    second.replace_input_with(3, first.outputs[1])
    second.replace_input_with(4, first.outputs[2])
    assert Layered(model).border(1) is None
    with pytest.raises(StageError):
        divide({"decode.onnx": model}, 2, [1, 1])


def test_ranges() -> None:
    array = np.arange(12).reshape(3, 4)
    assert taken(array, 1, (range(1, 2), range(3, 4))).tolist() == [[1, 3], [5, 7], [9, 11]]
    assert scaled((range(1, 3),), 4) == (range(4, 12),)
    assert shifted((range(1, 3),), 4) == (range(5, 7),)
    part = sliced(ir.tensor(array, name="a"), 0, (range(2, 3), range(1)))
    assert part.numpy().tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


def test_groups_become_smaller_where_ranges_end_within_them() -> None:
    assert common_block(64, (range(64, 128),)) == 64
    assert common_block(64, (range(96, 160),)) == 32
    with pytest.raises(NotCutError):
        common_block(64, (range(8, 16),))


def test_an_input_that_is_no_constant_cannot_be_cut(whole: Path) -> None:
    model = ir.load(whole / "prefill.onnx")
    node = next(node for node in model.graph if node.op_type == "MatMul")
    with pytest.raises(NotCutError):
        Slicer(model).use(node, 0, -1, (range(2),))


def test_a_product_with_a_matrix_that_is_stored_by_output_is_cut_by_its_rows() -> None:
    x, table = ir.Value(name="x"), ir.tensor(np.arange(12, dtype=np.float32).reshape(4, 3), name="table")
    matrix = ir.Value(name="table", shape=ir.Shape([4, 3]), const_value=table)
    node = ir.node("FusedMatMul", [x, matrix], attributes={"transB": 1}, domain="com.microsoft")
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], initializers=[matrix]), ir_version=10)
    found = product_of(node.outputs[0])
    assert found is not None
    assert (found.inputs, found.outputs) == (3, 4)
    found.columns(Slicer(model), (range(1, 3),))
    assert node.inputs[1] is not None
    assert node.inputs[1].const_value is not None
    assert node.inputs[1].const_value.numpy().tolist() == [[3, 4, 5], [6, 7, 8]]
    node.attributes.pop("transB")
    assert product_of(node.outputs[0]) is None


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_groups_whose_scales_are_cast_are_cut_by_output_and_by_input(bits: int, symmetric: bool) -> None:
    codes = rounded("w", normal(1, 48, 64), bits, 32, symmetric)
    matrix, x = values(codes).T.astype(np.float64), normal(2, 3, 64)
    whole = build("(float[n,k] x) => (float[n,m] y) { a = Neg(x) y = MatMul(a, w) }", w=normal(1, 64, 48))
    quantized = serialized(insert_qdq({"w": codes}, {"w": "float"})(whole).model)

    def part(ranges: tuple[range, ...], by_output: bool) -> np.ndarray:
        model = ir.from_proto(onnx.load_from_string(quantized))
        layer = product_of(model.graph.outputs[0])
        assert layer is not None and layer.rows is not None
        slicer = Slicer(model)
        (layer.columns if by_output else layer.rows)(slicer, ranges)
        sweep(model.graph)
        slicer.settle()
        return run(model, {"x": x if by_output else taken(x, 1, ranges)})["y"]

    kept = (range(16, 32), range(40, 48))
    np.testing.assert_allclose(part(kept, True), -x @ taken(matrix, 1, kept), rtol=1e-4, atol=1e-4)
    kept = (range(32), range(48, 64))
    wanted = -taken(x, 1, kept) @ taken(matrix, 0, kept)
    np.testing.assert_allclose(part(kept, False), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "points"), [(4, True), (4, False), (8, True)])
def test_blocks_are_cut_by_input_with_their_scales_and_zero_points(bits: int, points: bool) -> None:
    codes = rounded("w", normal(1, 16, 96), bits, 32, not points)
    matrix, x = values(codes).T.astype(np.float64), normal(2, 3, 96)
    whole = build("(float[n,k] x) => (float[n,m] y) { a = Neg(x) y = MatMul(a, w) }", w=normal(1, 96, 16))
    rule = Rule(kinds=("linear",), bits=bits)
    quantized = serialized(quantize_linear({"w": codes}, {"w": rule})(whole).model)
    for kept in ((range(32, 96),), (range(16, 80),), (range(32), range(64, 96))):  # one, in halves, two
        model = ir.from_proto(onnx.load_from_string(quantized))
        layer = product_of(model.graph.outputs[0])
        assert layer is not None and layer.rows is not None and layer.unit == 32
        slicer = Slicer(model)
        assert layer.rows(slicer, kept) == []
        sweep(model.graph)
        slicer.settle()
        found = run(model, {"x": taken(x, 1, kept)})["y"]
        np.testing.assert_allclose(found, -taken(x, 1, kept) @ taken(matrix, 0, kept), rtol=1e-4, atol=1e-4)


def product(inputs: int, group: int, must: int = 1) -> Product:
    """A linear layer whose weights have a scale for each `group` inputs."""
    x, y = ir.Value(name="x"), ir.Value(name="y")
    return Product(y, x, inputs, 64, group, must, (), lambda slicer, ranges: None, lambda slicer, ranges: [])


def test_a_layer_with_fewer_groups_than_ranks_is_cut_by_no_rank() -> None:
    for rank, part in enumerate(([range(16)], [range(16, 32)], [range(32, 48)])):
        assert list(_own_channels(product(48, 16), Place(rank, (1.0,) * 3))[0]) == part
    for rank in range(4):
        with pytest.raises(NotCutError):
            _own_channels(product(48, 16), Place(rank, (1.0,) * 4))
    assert _own_channels(product(192, 64), Place(1, (1.0,) * 4))[0] == (range(48, 96),), "in groups of 16"
