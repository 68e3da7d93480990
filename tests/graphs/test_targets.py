"""Every target's pipelines are in a valid order, name passes that exist, and use every pass there is."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from support.codes import rounded
from support.graphs import build

import satchel.graphs.passes
from satchel.graphs.ir.inputs import Lengths
from satchel.graphs.ir.pipeline import Step, check_order
from satchel.graphs.quant.quantized import KVScales, Quantized
from satchel.graphs.quant.recipe import Recipe, Rule
from satchel.graphs.targets.steps import FIT_FLOAT16, ROTATE, equalize_steps, order_steps, output_step
from satchel.graphs.targets.targets import TARGETS
from satchel.runtime.bundle.contract import DECODE_BLOCKS, EMBED, NATIVE, PHASES, PREFILL_INT8

MODULES = {
    module.name.rpartition(".")[2]: module.name
    for module in pkgutil.walk_packages(satchel.graphs.passes.__path__, "satchel.graphs.passes.")
    if not module.ispkg
}
FILES = sorted(MODULES)


RECIPE = Recipe("all", (), transforms=("rotate", "smooth", "hadamard"))
SCALES = KVScales(np.ones((1, 8), np.float32), np.ones((1, 8), np.float32))
NOTHING = Quantized(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), {}, {}, {0: SCALES}, "fp32")


def whole_pipelines() -> dict[str, tuple[Step, ...]]:
    """All that runs on one graph, for each target, phase and precision."""
    return varying_pipelines() | static_pipelines()


def static_pipelines() -> dict[str, tuple[Step, ...]]:
    return {
        f"{name} {phase} {tokens} {quantized is not None}": (
            *target.normalize,
            *target.fuse,
            *((*ROTATE, *equalize_steps(RECIPE, {})) if quantized is not None else ()),
            *target.static_steps(phase, Lengths(tokens, 8), quantized),
        )
        for name, target in TARGETS.items()
        if target.static is not None
        for phase in PHASES
        for tokens in (1, 4)
        for quantized in (None, NOTHING)
    }


def varying_pipelines() -> dict[str, tuple[Step, ...]]:
    return {
        f"{name} {phase} {precision}": (
            *target.normalize,
            *target.fuse,
            *((*ROTATE, *equalize_steps(RECIPE, {})) if quantized is not None else ()),
            *target.steps(phase, precision, quantized),
        )
        for name, target in TARGETS.items()
        if target.static is None
        for phase in target.phases
        for precision, quantized in (("fp32", None), ("fp16", None), ("int8", NOTHING))
    }


PIPELINES = {**whole_pipelines(), "float16": FIT_FLOAT16, "embeddings": (output_step(EMBED),)}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_comes_after_those_that_it_names(name: str) -> None:
    check_order(PIPELINES[name])


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_every_phase(name: str) -> None:
    assert set(PHASES) <= set(TARGETS[name].phases) <= {*PHASES, EMBED, PREFILL_INT8, DECODE_BLOCKS, NATIVE}


def test_a_target_of_dynamic_shapes_has_no_static_steps() -> None:
    with pytest.raises(ValueError, match="dynamic"):
        TARGETS["cpu"].static_steps("decode", Lengths(1, 8), None)


@pytest.mark.parametrize(
    ("prefill", "decode", "there"), [("float", "float", False), ("token", "tensor", True), ("token", "token", True)]
)
def test_decode_by_blocks_is_there_where_decode_takes_int8_activations(prefill: str, decode: str, there: bool) -> None:
    codes = rounded("w", np.ones((4, 64), np.float32), 8, None)
    rule = Rule(kinds=("linear",), bits=8, blocks=("channel",), prefill=prefill, decode=decode)
    quantized = Quantized(NOTHING.model, {"w": codes}, {"w": rule}, {}, "int8")
    assert (DECODE_BLOCKS in TARGETS["cpu"].graphs("int8", quantized)) is there
    assert TARGETS["cuda"].graphs("int8", quantized) == PHASES


@pytest.mark.parametrize(
    ("bits", "block", "kv_scales", "there"),
    [(8, None, {}, True), (4, 16, {}, True), (4, None, {}, False), (8, None, {0: SCALES}, True)],
)
def test_a_native_graph_is_there_where_a_product_is_by_codes_that_its_operator_takes(
    bits: int, block: int | None, kv_scales: dict[int, KVScales], there: bool
) -> None:
    matrix = np.ones((64, 4), np.float32)
    codes = rounded("w", matrix.T.copy(), bits, block)
    product = build("(float[n,64] x) => (float[n,4] y) { y = MatMul(x, w) }", w=matrix)
    quantized = Quantized(product, {"w": codes}, {"w": Rule(bits=bits)}, kv_scales, "int8")
    assert (NATIVE in TARGETS["cpu"].graphs("int8", quantized)) is there
    assert NATIVE not in TARGETS["cuda"].graphs("int8", quantized)
    elsewhere = Quantized(NOTHING.model, {"w": codes}, {"w": Rule(bits=bits)}, {}, "int8")
    assert NATIVE not in TARGETS["cpu"].graphs("int8", elsewhere), "nothing multiplies by the weight"


def test_a_native_graph_is_there_where_weights_are_float16() -> None:
    assert NATIVE in TARGETS["cpu"].graphs("fp16", None)
    assert NATIVE not in TARGETS["cpu"].graphs("fp32", None)
    assert NATIVE not in TARGETS["cuda"].graphs("fp16", None)


def test_every_pass_is_used_by_some_target() -> None:
    ordering = order_steps({"layer": np.arange(4)})
    assert {step.name for steps in (*PIPELINES.values(), ordering) for step in steps} == set(FILES)


def test_passes_load_of_the_runtime_only_the_bundle_format() -> None:
    code = "import sys, satchel.graphs.targets.targets; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not {"torch", "transformers", "onnxruntime", "onnxscript", "satchel.export"} & set(loaded)
    runtime = {name for name in loaded if name.startswith("satchel.runtime.")}
    assert "satchel.runtime.bundle.contract" in runtime
    assert {name for name in runtime if not name.startswith("satchel.runtime.bundle")} == set()


def test_a_pass_says_what_it_does_and_when_it_refuses() -> None:
    for step in {step.name: step for steps in PIPELINES.values() for step in steps}.values():
        before, after, refuses = map(step.graph_pass.doc.find, ("before:", "after:", "refuses when:"))
        assert -1 < before < after < refuses, step.name
