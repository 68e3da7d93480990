"""Flow: a graph runs piece by piece and gives what it gives in one, and its weights may be replaced on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from support.checkpoints import VOCABULARY, save_tiny, tiny_model

from satchel.export import ExportConfig, export_bundle
from satchel.export.compile import lower, open_source, trace_source
from satchel.export.quantize import flow as flow_module
from satchel.export.quantize.flow import Flow, Inputs, fresh
from satchel.graphs.ir.values import weight
from satchel.runtime.bundle.contract import LOGITS, present_names
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.engine import Engine

WIDE: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 192,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}
"""Products of this model are large enough that each begins a piece."""

WINDOWS = np.random.default_rng(3).integers(3, VOCABULARY, (4, 24))
PIECES = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoints") / "wide", **WIDE)


@pytest.fixture(scope="module")
def common(wide: Path) -> ir.Model:
    config = ExportConfig(Path("unused"), precision="fp32")
    checkpoint = open_source(wide, config)
    return lower(trace_source(checkpoint, config), checkpoint, config)[0]


@pytest.fixture(scope="module")
def scored(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """The logits of the exported score graph, [windows, length, vocabulary]."""
    folder = tmp_path_factory.mktemp("bundles") / "wide"
    manifest = export_bundle(wide, ExportConfig(folder, precision="fp32", certificate=False))
    engine = Engine.open(Bundle(folder, manifest), threads=1)
    return np.stack([engine.score(window) for window in WINDOWS])


def logits(flow: Flow) -> NDArray[np.float32]:
    return np.concatenate([flow.logits(index) for index in range(flow.batches)])


def matrix(model: ir.Model, name: str) -> str:
    """The name of the weight of the product with that name."""
    return str(model.graph.node(name).inputs[1].name)  # type: ignore[union-attr]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_logits_are_those_of_the_score_graph(
    batch: int, common: ir.Model, scored: NDArray[np.float32], tmp_path: Path
) -> None:
    flow = Flow(common, WINDOWS, tmp_path, batch=batch)
    flow.run()
    found = logits(flow)
    assert (found.shape, found.dtype) == (scored.shape, np.float32)
    np.testing.assert_allclose(found, scored, rtol=1e-5, atol=1e-5 * np.abs(scored).max())


def test_weights_that_are_mapped_change_nothing(
    common: ir.Model, scored: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_module, "MAPPED_BYTES", 1 << 17)
    flow = Flow(common, WINDOWS, tmp_path)
    flow.run()
    np.testing.assert_allclose(logits(flow), scored, rtol=1e-5, atol=1e-5 * np.abs(scored).max())
    assert list(tmp_path.glob("weight-*"))


def test_each_product_is_visited_in_order_with_its_input(common: ir.Model, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def visit(node: ir.Node, inputs: Inputs) -> Mapping[str, NDArray[Any]]:
        if node.op_type == "MatMul":
            first, again = list(inputs()), list(inputs())
            assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
            seen[str(node.name)] = (len(first), *first[0].shape)
        return {}

    done: list[int] = []
    flow = Flow(common, WINDOWS, tmp_path, batch=2)
    flow.run(visit, progress=done.append)
    assert list(seen) == [f"model.layers.{layer}.{piece}" for layer in range(2) for piece in PIECES]
    assert flow.pieces()[-len(seen) :] == list(seen)
    assert len(done) == len(flow.pieces())
    assert seen["model.layers.0.mlp.down_proj"] == (2, 2 * 24, 192)
    assert seen["model.layers.1.self_attn.qkv_proj"] == (2, 2 * 24, 160)


def test_a_weight_that_is_replaced_counts_from_there_on(common: ir.Model, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    key = matrix(common, name)
    lazy = weight(common.graph.initializers[key])
    assert lazy is not None
    halved = lazy.numpy() / 2
    flow = Flow(common, WINDOWS, tmp_path)
    flow.run(lambda node, inputs: {key: halved} if node.name == name else {})
    model = tiny_model("llama", **WIDE)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
        wanted = model(torch.from_numpy(WINDOWS)).logits.numpy()
    np.testing.assert_allclose(logits(flow), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_branch_goes_on_from_the_middle_and_leaves_its_flow_alone(
    common: ir.Model, scored: NDArray[np.float32], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.o_proj"
    key = matrix(common, name)
    lazy = weight(common.graph.initializers[key])
    assert lazy is not None
    replaced = {key: np.zeros(lazy.dims, np.float32)}

    def visit(node: ir.Node, inputs: Inputs) -> Mapping[str, NDArray[Any]]:
        visited.append(str(node.name))
        return replaced if node.name == name else {}

    flow = Flow(common, WINDOWS, fresh(tmp_path, "trunk"), batch=2, keep=True)
    flow.run()
    first = flow.pieces().index(name)
    visited: list[str] = []
    branch = flow.branch()
    branch.run(visit, first=first)
    assert visited == flow.pieces()[first:]
    whole = Flow(common, WINDOWS, fresh(tmp_path, "whole"), batch=2)
    whole.run(visit)
    np.testing.assert_array_equal(logits(branch), logits(whole))
    np.testing.assert_allclose(logits(flow), scored, rtol=1e-5, atol=1e-5 * np.abs(scored).max())
    assert np.abs(logits(branch) - scored).max() > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_caches_are_observed_batch_by_batch(batch: int, common: ir.Model, tmp_path: Path) -> None:
    caches = [str(v.name) for v in common.graph.outputs if v.name != LOGITS]
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in caches}
    flow = Flow(common, WINDOWS, tmp_path, batch=batch)
    flow.run(observe=lambda name, array: found[name].append(array), observed=caches)
    model = tiny_model("llama", **WIDE)
    with torch.no_grad():
        cache = model(torch.from_numpy(WINDOWS), use_cache=True).past_key_values
    for layer in range(2):
        for name, wanted in zip(
            present_names(layer), (cache.layers[layer].keys, cache.layers[layer].values), strict=True
        ):
            assert len(found[name]) == len(WINDOWS) // batch
            np.testing.assert_allclose(np.concatenate(found[name]), wanted.numpy(), rtol=1e-3, atol=1e-4)


def test_windows_that_make_no_whole_batches_are_an_error(common: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"4 windows .* batches of 3"):
        Flow(common, WINDOWS, tmp_path, batch=3)
