"""Passes of a user's own for other targets than the CPU: where they stand, what they may leave, and their absence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.custom_ops import LIBRARY, halve_logits, split_signs
from support.families import FAMILIES, VOCABULARY, save
from support.static_graphs import Lowered, graphs_of, lowered, write_static

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.export.user_passes import open_passes
from satchel.graphs.ir.contract import Report
from satchel.runtime import Custom, Engine, open_bundle
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.plain_graphs import without_custom

IDS = [int(i) for i in np.random.default_rng(1).integers(3, VOCABULARY, 12)]
GRAPHS = ("prefill_4", "prefill_8", "decode", "score")


def leave_gelu(model: ir.Model, report: Report) -> None:
    """Put an operator into the graph that version 17 does not have."""
    next(node for node in model.graph if node.op_type == "Sigmoid").op_type = "Gelu"
    report.count += 1


def import_newer(model: ir.Model, report: Report) -> None:
    model.graph.opset_imports[""] = 21
    report.count += 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(FAMILIES["llama"], tmp_path_factory.mktemp("targets") / "checkpoint")


@pytest.fixture(scope="module")
def common(checkpoint: Path) -> Lowered:
    return lowered(checkpoint, ExportConfig(checkpoint.parent / "unused", target="cann", max_context=32))


@pytest.fixture(scope="module")
def static(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "static"
    config = ExportConfig(
        folder, "a16w8", 32, "cann", prefill_lengths=(4, 8), passes=(halve_logits,), certificate=False
    )
    export_bundle(checkpoint, config)
    return folder


def score(folder: Path, custom: Custom) -> np.ndarray:
    return Engine.open(open_bundle(folder, custom=custom), threads=1).score(IDS)


def by_steps(folder: Path, custom: Custom) -> np.ndarray:
    engine = Engine.open(open_bundle(folder, custom=custom), threads=1)
    state = engine.new_state(len(IDS))
    return np.stack([engine.prefill(state, IDS[:-1]).copy(), engine.decode(state, IDS[-1]).copy()])


@pytest.mark.parametrize("run", [score, by_steps])
def test_static_graphs_run_with_and_without_the_passes(run: object, static: Path) -> None:
    plain = run(static, Custom(passes=False))  # type: ignore[operator]
    np.testing.assert_allclose(run(static, Custom()), plain / 2, rtol=2e-3, atol=2e-3)  # type: ignore[operator]


def test_the_manifest_has_both_kinds_of_static_graphs(static: Path, checkpoint: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(static / "manifest.json")
    assert manifest.plain is not None
    assert (manifest.graphs, manifest.plain.graphs) == (None, None)
    files = [part.file for graph in graphs_of(manifest).values() for part in graph.parts]
    plain = without_custom(manifest)
    assert [part.file for graph in graphs_of(plain).values() for part in graph.parts] == [f"plain_{f}" for f in files]
    assert set(manifest.files) - set(plain.files) == {f"{name}.onnx" for name in GRAPHS}
    halved = [
        done["graph"] for done in manifest.passes if done["pass"].endswith(":halve_logits") and done["count"] == 1
    ]
    assert halved == list(GRAPHS)
    config = ExportConfig(tmp_path / "plain", "a16w8", 32, "cann", prefill_lengths=(4, 8), certificate=False)
    alone = export_bundle(checkpoint, config)
    assert alone.plain is None
    for name in GRAPHS:  # but for the places of weights, which all graphs of a bundle share
        found, wanted = (onnx.load(path, load_external_data=False).graph for path in
                         (static / f"plain_{name}.onnx", tmp_path / "plain" / f"{name}.onnx"))  # fmt: skip
        assert list(found.node) == list(wanted.node)
    assert manifest.files["weights.bin"].bytes < alone.files["weights.bin"].bytes + 4096


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (leave_gelu, "leave_gelu: leaves Gelu, .*--target cann .* opset 17"),
        (split_signs, "split_signs: leaves ai.onnx.contrib::NegPos, .*--target cann"),
        (import_newer, "import_newer: imports opset 21, .*--target cann"),
    ],
)
def test_a_pass_that_leaves_what_the_target_does_not_know_is_named(
    given: object, says: str, common: Lowered, tmp_path: Path
) -> None:
    config = ExportConfig(
        tmp_path / "out", target="cann", max_context=32, prefill_lengths=(8,), passes=open_passes((given,))
    )
    with pytest.raises(ExportError, match=says):
        write_static(common, config)
    assert list(tmp_path.iterdir()) == []


def test_libraries_have_no_place_in_static_graphs(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--custom-ops .* --target cann"):
        ExportConfig(tmp_path, target="cann", passes=(halve_logits,), custom_ops=(LIBRARY,))


@pytest.fixture(scope="module")
def cuda(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "cuda"
    export_bundle(checkpoint, ExportConfig(folder, "fp16", 32, "cuda", passes=(halve_logits,), certificate=False))
    return folder


@pytest.mark.parametrize("run", [score, by_steps])
def test_passes_run_for_cuda_and_are_switched_off(run: object, cuda: Path) -> None:
    manifest = Manifest.read(cuda / "manifest.json")
    assert manifest.plain is not None
    assert manifest.plain.graphs is not None
    for graphs in (manifest.graphs, manifest.plain.graphs):
        assert graphs is not None
        assert (graphs.decode.session_of, graphs.prefill.top_tokens) == ("prefill", 64)
    plain = run(cuda, Custom(passes=False))  # type: ignore[operator]
    np.testing.assert_allclose(run(cuda, Custom()), plain / 2, rtol=2e-3, atol=2e-3)  # type: ignore[operator]
