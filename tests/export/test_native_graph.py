"""The native graph of a bundle: its weights as a device makes them, and what it computes by satchel's operators."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper
from support.checkpoints import save_tiny
from support.codes import rounded
from support.families import VOCABULARY, by_family
from support.graphs import operators, run
from support.native_ops import run_reference
from support.static_graphs import lowered_family

from satchel.export import ExportConfig, export_bundle
from satchel.graphs.ir import pipeline
from satchel.graphs.ir.values import weight
from satchel.graphs.passes.quantize.insert_hadamard import insert_hadamard
from satchel.graphs.quant.quantized import Quantized, QuantizedWeight
from satchel.graphs.quant.recipe import Rule
from satchel.graphs.targets.targets import TARGETS
from satchel.runtime.bundle.contract import NATIVE, RAGGED_INPUTS, Layout
from satchel.runtime.bundle.layouts import file_name
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.engine import Engine
from satchel.runtime.optimize.derived import make_weights
from satchel.runtime.ort.open_bundle import open_bundle

NATIVE_NAME = file_name(Layout.PANELS)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 128, "intermediate_size": 256, **HEADS}
NARROW = {"hidden_size": 96, "intermediate_size": 176, "head_dim": 32, **HEADS}  # no multiples of 64
FORMS = {
    "int8": (WIDE, "int8", "float"),
    "filled up": (NARROW, "int8", "float"),
    "4 bits": (WIDE, "int4", "float"),
    "zero points": (WIDE, "a16w4", "float"),
    "int8 cache": (WIDE, "int8", "int8"),
}
IDS = np.random.default_rng(3).integers(4, 90, 13)
CAPACITY = 24


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The bundle of a form, exported once."""

    @functools.cache
    def export(form: str) -> Bundle:
        folder = tmp_path_factory.mktemp("native")
        widths, precision, kv_cache = FORMS[form]
        checkpoint = save_tiny(folder / "checkpoint", **widths)
        config = ExportConfig(folder / "bundle", precision, kv_cache=kv_cache, max_context=64, certificate=False)
        export_bundle(checkpoint, config)
        return open_bundle(folder / "bundle")

    return export


@pytest.fixture(params=FORMS)
def bundle(request: pytest.FixtureRequest, exported: Callable[[str], Bundle]) -> Bundle:
    return exported(request.param)


def step(
    model: onnx.ModelProto, ids: NDArray[np.int64], mask: NDArray[np.int64], cache: dict[str, NDArray[Any]]
) -> NDArray[np.float32]:
    """The logits after `ids` [batch, new] by the reference; writes to the cache."""
    found = run_reference(model, {"input_ids": ids, "attention_mask": mask, **cache})
    cache.update({name: found[name.replace("past_key_values", "present")] for name in cache})
    return found["logits"][:, 0]


def empty_cache(model: onnx.ModelProto, batch: int) -> dict[str, NDArray[Any]]:
    caches = {value.name: value.type.tensor_type for value in model.graph.input if "past" in value.name}
    sizes = {name: [dim.dim_value for dim in kind.shape.dim] for name, kind in caches.items()}
    return {
        name: np.zeros((batch, heads, CAPACITY, width), helper.tensor_dtype_to_np_dtype(caches[name].elem_type))
        for name, (_, heads, _, width) in sizes.items()
    }


@pytest.fixture(scope="module")
def opened(
    exported: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], onnx.ModelProto]:
    """The native graph of a form with the weights that a device makes."""

    @functools.cache
    def load(form: str) -> onnx.ModelProto:
        place, found = tmp_path_factory.mktemp("special"), exported(form)
        shutil.copytree(found.folder, place, dirs_exist_ok=True)
        make_weights(found, found.manifest.variant(NATIVE), place / NATIVE_NAME)
        return onnx.load(place / "native.onnx")

    return load


@pytest.mark.parametrize("form", FORMS)
def test_prefill_and_decode_give_what_the_other_graphs_give(
    form: str, exported: Callable[[str], Bundle], opened: Callable[[str], onnx.ModelProto]
) -> None:
    engine, model = Engine.open(exported(form), threads=1), opened(form)
    state = engine.new_state(CAPACITY)
    wanted = [engine.prefill(state, IDS[:9]).copy(), *(engine.decode(state, int(i)).copy() for i in IDS[9:])]
    cache = empty_cache(model, 1)
    found = [step(model, IDS[None, :9], np.ones((1, 9), np.int64), cache)[0]]
    for end in range(10, len(IDS) + 1):
        found.append(step(model, IDS[None, end - 1 : end], np.ones((1, end), np.int64), cache)[0])
    # Both round activations to int8, and where a number lies between two steps they may take different ones.
    error = np.linalg.norm(np.stack(found) - np.stack(wanted), axis=1) / np.linalg.norm(np.stack(wanted), axis=1)
    assert error.max() < 0.02, error


def test_rows_of_different_lengths_decode_together(opened: Callable[[str], onnx.ModelProto]) -> None:
    model, lengths = opened("int8"), (8, 5)
    cache, alone = empty_cache(model, 2), []
    for row, length in enumerate(lengths):
        own = empty_cache(model, 1)
        step(model, IDS[None, :length], np.ones((1, length), np.int64), own)
        for name, array in own.items():
            cache[name][row] = array[0]
        alone.append(step(model, IDS[None, length : length + 1], np.ones((1, length + 1), np.int64), own)[0])
    mask = (np.arange(9) <= np.asarray(lengths)[:, None]).astype(np.int64)
    together = step(model, IDS[list(lengths)][:, None], mask, cache)
    np.testing.assert_allclose(together, np.stack(alone), rtol=0, atol=1e-5 * np.abs(together).max())


# How many Linear and Attention two layers and a head become.
EXPECTED = {"gemma2": (9, 2), "gpt2": (9, 2), "gpt_neox": (9, 2), "cohere": (9, 2)}


@pytest.mark.parametrize("name", by_family(EXPECTED))
def test_families_compute_the_same_by_satchel_s_own_operators(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    quantized = plainly_rounded(common(name, tmp_path_factory))
    target = TARGETS["cpu"]
    prefill, own = (
        pipeline.run(quantized.model, target.steps(phase, "a8w8", quantized))[0] for phase in ("prefill", NATIVE)
    )
    kinds = operators(own)
    assert tuple(kinds[f"satchel::{kind}"] for kind in ("Linear", "Attention")) == EXPECTED[name]
    feeds = {
        "input_ids": np.random.default_rng(1).integers(3, VOCABULARY, (1, 11)),
        "attention_mask": np.ones((1, 11), np.int64),
    }
    for value in own.graph.inputs:
        if value.shape is not None and len(value.shape) == 4:
            _, heads, _, width = value.shape
            feeds[str(value.name)] = np.zeros((1, heads, CAPACITY, width), np.float32)
    wanted, found = run(prefill, feeds)["logits"], run_reference(own, feeds)["logits"]
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)
    assert set(RAGGED_INPUTS) <= {value.name for value in own.graph.inputs}


def test_a_model_with_states_takes_no_ragged_rows(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A state would go on from one sequence to the next."""
    quantized = plainly_rounded(common("lfm2", tmp_path_factory))
    own, done = pipeline.run(quantized.model, TARGETS["cpu"].steps(NATIVE, "a8w8", quantized))
    assert not set(RAGGED_INPUTS) & {value.name for value in own.graph.inputs}
    (refused,) = [each for each in done if each.name == "take_rows"]
    assert "is not the cache of satchel's own attention" in refused.refusals[0].reason


def common(name: str, places: pytest.TempPathFactory) -> ir.Model:
    """The family's graph as all phases begin with it, with Hadamard matrices."""
    return insert_hadamard(16)(lowered_family(name, places)).model


def plainly_rounded(model: ir.Model) -> Quantized:
    """All products in 8 bits with a scale for each output, and a tied table in blocks."""
    weights: dict[str, QuantizedWeight] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and (matrix := weight(node.inputs[1])) is not None:
            weights[matrix.name] = rounded(matrix.name, np.ascontiguousarray(matrix.numpy().T), 8, None)
        if node.op_type == "FusedMatMul" and (table := weight(node.inputs[1])) is not None:
            weights[table.name] = rounded(table.name, table.numpy(), 8, 16)
    rule = Rule(kinds=("linear",), bits=8, blocks=("channel",), prefill="token", decode="token")
    return Quantized(model, weights, dict.fromkeys(weights, rule), {}, "a8w8")
