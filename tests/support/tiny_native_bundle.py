"""The tiny bundle with an int8 head, and a native graph with a float16 cache and a satchel:Linear over panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from support.tiny_bundle import HIDDEN, VOCABULARY, read_manifest, record, write_bundle, write_manifest

from satchel.runtime.kernels import library

PANELS = -(-VOCABULARY // 16)
CACHE = ("past_key_values.", "present.")
"""What names of keys and values begin with."""


def halved(tensor: dict[str, Any]) -> dict[str, Any]:
    """The manifest's entry of an input or output, with keys and values in float16."""
    return {**tensor, "dtype": "float16"} if tensor["name"].startswith(CACHE) else tensor


def placed(name: str, dtype: int, dims: tuple[int, ...], location: str, offset: int, length: int) -> onnx.TensorProto:
    """An initializer whose data lies in another file."""
    tensor = onnx.TensorProto(name=name, data_type=dtype, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_native_bundle(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the bundle into the new folder `folder`; `changes` are attributes of the native head."""
    write_bundle(folder, seed=seed)
    manifest, rng = read_manifest(folder), np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (HIDDEN, VOCABULARY)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, VOCABULARY).astype(np.float32) / 100
    content = (folder / "weights.bin").read_bytes()
    content += b"\0" * (-len(content) % 64)
    stored = [
        placed("head.codes", TensorProto.INT8, codes.shape, "weights.bin", len(content), codes.nbytes),
        placed(
            "head.scales", TensorProto.FLOAT, scales.shape, "weights.bin", len(content) + codes.nbytes, scales.nbytes
        ),
    ]
    (folder / "weights.bin").write_bytes(content + codes.tobytes() + scales.tobytes())
    size = PANELS * HIDDEN * 16
    panels = [
        placed("head.panels", TensorProto.UINT8, (PANELS, HIDDEN * 16), "panels.bin", 0, size),
        placed("head.panel_scales", TensorProto.FLOAT, (PANELS, 1, 16), "panels.bin", size, PANELS * 64),
    ]
    attributes = {"inputs": HIDDEN, "outputs": VOCABULARY, "bits": 8, "block": 0, **changes}
    for name in ("prefill", "decode", "score", "native"):
        model = onnx.load(folder / f"{'prefill' if name == 'native' else name}.onnx", load_external_data=False)
        graph = model.graph
        if name == "native":
            head = next(node for node in graph.node if "logits" in node.output)
            linear = helper.make_node("Linear", [head.input[0], "head.panels", "head.panel_scales"], ["logits"])
            linear.domain = "satchel"
            linear.name = "head"
            linear.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
            kept = [node for node in graph.node if "logits" not in node.output and node.op_type != "DequantizeLinear"]
            tensors = [t for t in graph.initializer if not t.name.startswith("head")] + panels
            nodes = [*kept, linear]
            for node in nodes:
                if node.op_type == "GroupQueryAttention":
                    node.op_type, node.domain = "Attention", "satchel"
                if node.op_type == "GatherND":  # as in graphs that take ragged rows
                    node.op_type, node.domain, node.name = "LastToken", "satchel", "last_token.rows"
                    node.input[1] = "real"
                    del node.attribute[:]
            for value in (*graph.input, *graph.output):
                if value.name.startswith(CACHE):
                    value.type.tensor_type.elem_type = TensorProto.FLOAT16
            model.opset_import.append(helper.make_opsetid("satchel", 1))
        else:
            nodes = [helper.make_node("DequantizeLinear", ["head.codes", "head.scales"], ["head"], axis=1), *graph.node]
            tensors = [t for t in graph.initializer if t.name != "head"] + stored
        for field, values in ((graph.node, nodes), (graph.initializer, tensors)):
            values = [type(value).FromString(value.SerializeToString()) for value in values]
            del field[:]
            field.extend(values)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    graphs = manifest["graphs"]
    for spec in graphs.values():
        spec["session"] = {}
    manifest["variants"] = [
        {
            "name": "native",
            "runs": ["prefill", "decode"],
            "graph": {
                **graphs["prefill"],
                "file": "native.onnx",
                **{side: [halved(tensor) for tensor in graphs["prefill"][side]] for side in ("inputs", "outputs")},
            },
            "weights": {"layout": "panels", "file": "panels.bin"},
            "requires": [],
            "kernel_abi": library.VERSION,
        }
    ]
    for name in ("prefill.onnx", "decode.onnx", "score.onnx", "native.onnx", "weights.bin"):
        manifest["files"][name] = record((folder / name).read_bytes())
    write_manifest(folder, manifest)
    return folder
