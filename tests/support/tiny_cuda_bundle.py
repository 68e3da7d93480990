"""The tiny bundle as for target cuda: decode with a mask of the cache's length, and the most likely tokens chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from support.tiny_bundle import read_manifest, record, write_bundle, write_manifest

TOP = 12


def write_cuda_bundle(folder: Path, *, shared: bool = True, top: int = TOP, **options: Any) -> Path:
    """Write what `write_bundle` does, for target cuda; `shared` runs decode in the session of prefill.

    `top` 0 leaves the choice out. Further options are those of `write_bundle`.
    """
    write_bundle(folder, **options)
    document = read_manifest(folder) | {"target": "cuda"}
    graphs = document["graphs"]
    for phase in ("prefill", "decode"):
        if top:
            _choose(folder, document, phase, top)
    graphs["decode"]["inputs"][1]["shape"] = ["batch", "capacity"]
    graphs["decode"]["session_of"] = "prefill" if shared else None
    write_manifest(folder, document)
    return folder


def _choose(folder: Path, document: dict[str, Any], phase: str, top: int) -> None:
    """Give a graph and its description the outputs top_logits and top_ids."""
    name = f"{phase}.onnx"
    model = onnx.load(folder / name, load_external_data=False)
    model.graph.node.append(helper.make_node("TopK", ["logits", "top"], ["top_logits", "top_ids"], axis=-1))
    model.graph.initializer.append(numpy_helper.from_array(np.array([top], np.int64), "top"))
    for output, dtype, element in (
        ("top_logits", "float32", TensorProto.FLOAT),
        ("top_ids", "int64", TensorProto.INT64),
    ):
        shape = ["batch", 1, top]
        model.graph.output.append(helper.make_tensor_value_info(output, element, shape))
        document["graphs"][phase]["outputs"].append({"name": output, "dtype": dtype, "shape": shape})
    content = model.SerializeToString()
    (folder / name).write_bytes(content)
    document["files"][name] = record(content)
