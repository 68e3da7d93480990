"""A device bundle in float16 of a model whose inner values float16 does not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from support.checkpoints import add_tokenizer, reloaded, tiny_model
from support.command import Said

from satchel.runtime import Generator

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


def infinite(folder: Path) -> list[str]:
    """The float16 values of the score graph that are not finite, each rounded as a device rounds it."""
    model = onnx.load(folder / "score.onnx", load_external_data=False)
    session = onnxruntime.InferenceSession(folder / "score.onnx")
    shapes = {"batch": 1, "sequence": len(IDS)}
    feeds = {}
    for value in session.get_inputs():
        shape = [shapes.get(size, len(IDS)) if isinstance(size, str) else size for size in value.shape]
        feeds[value.name] = np.ones(shape, np.int64) if "mask" in value.name else np.zeros(shape, np.float16)
    feeds["input_ids"] = IDS[None]
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


def test_products_beyond_float16_are_scaled_down_and_named(export: Callable[..., Said], tmp_path: Path) -> None:
    place = save_loud(tmp_path / "loud", 5e3, 1e-3)
    ran = export(place, "-o", tmp_path / "bundle", "--target", "cuda", "--no-certificate")
    (warning,) = [line for line in ran.err.splitlines() if line.startswith("warning")]
    assert "loud: scaled down, as float16 ends at 65504: mul_" in warning
    assert infinite(tmp_path / "bundle") == []
    model = tiny_model("llama")
    model.load_state_dict({name: torch.from_numpy(array) for name, array in reloaded(place).items()})
    with torch.no_grad():
        right = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    found = Generator.open(tmp_path / "bundle", specialize=False).engine.score(IDS)
    assert np.abs(found - right).max() < 1e-2 * np.abs(right).max()


def test_values_that_a_device_needs_in_float16_are_refused_by_name(
    refused: Callable[..., None], tmp_path: Path
) -> None:
    refused(save_loud(tmp_path / "loud", 5e3, 1.0), "--target", "cuda", says=("float16", "65504", "--target cpu"))


def test_a_model_of_usual_size_has_no_warning(export: Callable[..., Said], tmp_path: Path) -> None:
    place = save_loud(tmp_path / "quiet", 1.0, 1.0)
    assert "65504" not in export(place, "-o", tmp_path / "bundle", "--target", "cuda", "--no-certificate").err
