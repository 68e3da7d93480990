"""Weights handed over as memory stand inside the graph that a provider gets, and give the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.families import FAMILIES, save
from support.static_graphs import write_static

from satchel.export import ExportConfig
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.ort.experimental.weights_in_memory import hand_over_weights
from satchel.runtime.ort.open_bundle import open_bundle

GRAPH = "decode.onnx"
_KEPT: list[np.ndarray] = []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    place = tmp_path_factory.mktemp("llama")
    config = ExportConfig(place / "bundle", target="cann", max_context=32, prefill_lengths=(4,))
    write_static(save(FAMILIES["llama"], place / "checkpoint"), config)
    return open_bundle(config.output)


def opened(bundle: Bundle, saved: Path, in_memory: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(saved)
    _KEPT.extend(hand_over_weights(bundle, GRAPH, options) if in_memory else [])
    return ort.InferenceSession(bundle.path(GRAPH), options, providers=["CPUExecutionProvider"])


def test_the_graph_that_a_provider_gets_has_the_weights_inside(bundle: Bundle, tmp_path: Path) -> None:
    results, outside = [], []
    for in_memory in (False, True):
        session = opened(bundle, tmp_path / "saved.onnx", in_memory)
        saved = onnx.load(tmp_path / "saved.onnx", load_external_data=False)
        outside.append(sum(t.data_location == onnx.TensorProto.EXTERNAL for t in saved.graph.initializer))
        types = {"tensor(int64)": np.int64, "tensor(bool)": np.bool_, "tensor(float16)": np.float16}
        feeds = {v.name: np.ones(v.shape, types[v.type]) for v in session.get_inputs()}
        results.append(session.run(["logits"], feeds)[0])
    assert outside[0] > 10, "without it they are references to a file"
    assert outside[1] == 0
    np.testing.assert_array_equal(results[0], results[1])


def test_a_weight_beyond_its_file_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from satchel.runtime.bundle import onnx_wire

    content = onnx_wire.map_external_data(bundle.read(GRAPH), lambda place: {**place, "offset": "99999999"})
    monkeypatch.setattr(Bundle, "read", lambda self, name: content)
    with pytest.raises(BundleError, match="goes beyond its file"):
        hand_over_weights(bundle, GRAPH, ort.SessionOptions())
