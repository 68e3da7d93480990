"""A device bundle in float16 of a model whose inner values float16 does not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from support.checkpoints import add_tokenizer, reloaded, tiny_model
from support.command import Said

from satchel.runtime import Generator
from satchel.runtime.execution.experimental.static_inputs import StaticInputs
from satchel.runtime.ort.open_bundle import open_bundle

TARGETS = ("cuda", "cann")
IDS = np.random.default_rng(3).integers(0, 300, 24)


def save_loud(folder: Path, gate: float, down: float) -> Path:
    """A model with weights of gate and branch `gate` times as large, and `down` times for the layer behind them."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= gate
            layer.mlp.gate_proj.weight *= gate
            layer.mlp.down_proj.weight *= down
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def feeds_of(folder: Path, session: onnxruntime.InferenceSession) -> dict[str, NDArray[Any]]:
    """What the score graph takes for `IDS`, with an empty cache."""
    shapes = {"batch": 1, "sequence": len(IDS)}
    kinds = {"tensor(int64)": np.int64, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}
    feeds = {}
    for value in session.get_inputs():
        shape = [shapes.get(size, len(IDS)) if isinstance(size, str) else size for size in value.shape]
        feeds[value.name] = np.full(shape, "mask" in value.name, kinds[value.type])
    feeds["input_ids"][0, : len(IDS)] = IDS
    bundle = open_bundle(folder)
    static = bundle.manifest.static
    if static is not None:
        given = {name: array for name, array in feeds.items() if not name.startswith("past")}
        StaticInputs(bundle, static).fill(given, IDS, 0)
    return feeds


def infinite(folder: Path) -> list[str]:
    """The float16 values of the score graph that are not finite, each rounded as a device rounds it."""
    model = onnx.load(folder / "score.onnx", load_external_data=False)
    feeds = feeds_of(folder, onnxruntime.InferenceSession(folder / "score.onnx"))
    typed = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    names = [o for node in model.graph.node for o in node.output if typed.get(o) == onnx.TensorProto.FLOAT16]
    assert len(names) > 20
    given = {output.name for output in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None) for name in names if name not in given
    )
    onnx.save(model, folder / "probe.onnx")
    found = onnxruntime.InferenceSession(folder / "probe.onnx").run(names, feeds)
    return [name for name, array in zip(names, found, strict=True) if not np.isfinite(array).all()]


def check_scores(bundle: Path, checkpoint: Path) -> None:
    """Compare a bundle's logits with transformers'."""
    model = tiny_model("llama")
    model.load_state_dict({name: torch.from_numpy(array) for name, array in reloaded(checkpoint).items()})
    with torch.no_grad():
        right = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    found = Generator.open(bundle, specialize=False).engine.score(IDS)
    assert np.abs(found - right).max() < 1e-2 * np.abs(right).max()


@pytest.mark.parametrize("target", TARGETS)
def test_products_beyond_float16_are_scaled_down_and_named(
    export: Callable[..., Said], tmp_path: Path, target: str
) -> None:
    place = save_loud(tmp_path / "loud", 5e3, 1e-3)
    ran = export(place, "-o", tmp_path / "bundle", "--target", target, "--no-certificate")
    (warning,) = [line for line in ran.err.splitlines() if line.startswith("warning")]
    assert "loud: scaled down, as float16 ends at 65504: mul_" in warning
    assert infinite(tmp_path / "bundle") == []
    check_scores(tmp_path / "bundle", place)


def save_loud_cache(folder: Path) -> Path:
    """A model with large values in its cache, which the layer behind attention makes small again."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 1e5
            layer.self_attn.o_proj.weight *= 1e-5
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_cache_beyond_float16_is_refused_by_name(refused: Callable[..., None], tmp_path: Path, target: str) -> None:
    refused(save_loud_cache(tmp_path / "loud"), "--target", target, says=("float16", "65504", "--target cpu"))


def test_a_residual_stream_that_a_fused_norm_needs_in_float16_is_refused_by_name(
    refused: Callable[..., None], tmp_path: Path
) -> None:
    place = save_loud(tmp_path / "loud", 5e3, 1.0)
    refused(place, "--target", "cuda", says=("float16", "65504", "--target cpu"))


def test_a_residual_stream_beyond_float16_stays_in_float32_where_norms_are_arithmetic(
    export: Callable[..., Said], tmp_path: Path
) -> None:
    place = save_loud(tmp_path / "loud", 5e3, 1.0)
    ran = export(place, "-o", tmp_path / "bundle", "--target", "cann", "--no-certificate")
    (warning,) = [line for line in ran.err.splitlines() if line.startswith("warning")]
    assert "loud: kept in float32, as float16 ends at 65504: mul_" in warning
    assert infinite(tmp_path / "bundle") == []
    check_scores(tmp_path / "bundle", place)


@pytest.mark.parametrize("target", [TARGETS[0], pytest.param(TARGETS[1], marks=pytest.mark.slow)])
def test_a_model_of_usual_size_has_no_warning(export: Callable[..., Said], tmp_path: Path, target: str) -> None:
    place = save_loud(tmp_path / "quiet", 1.0, 1.0)
    assert "65504" not in export(place, "-o", tmp_path / "bundle", "--target", target, "--no-certificate").err
