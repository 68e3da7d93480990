"""Int8 prefill of 4-bit bundles: weights made on the device, against ONNX's own reading of what the bundle stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.checkpoints import save_tiny
from support.command import Satchel
from support.families import by_family
from support.tiny_bundle import read_manifest, write_manifest

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.bundle import layouts
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.optimize.derived import make_weights
from satchel.runtime.ort.open_bundle import open_bundle

EXPANDED_NAME = layouts.file_name(Layout.INT8)
IDS = list(range(4, 28))
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
FORMS = {"int4": "int4", "zero points": "a16w4", "mixed": "int4-mixed"}


@pytest.fixture(scope="module", params=by_family(FORMS, {"int4", "zero points"}.__contains__))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("int8-prefill")
    checkpoint = save_tiny(folder / "checkpoint", **WIDE)
    recipe = FORMS[request.param]
    precision = "a16w4" if recipe == "a16w4" else "int4"
    export_bundle(checkpoint, ExportConfig(folder / "bundle", precision, max_context=64, recipe=recipe))
    return open_bundle(folder / "bundle")


@pytest.mark.slow
def test_a_specialized_bundle_has_an_int8_prefill_and_decodes_as_before(satchel: Satchel, bundle: Bundle) -> None:
    folder = bundle.folder
    before = sorted(path.name for path in folder.iterdir())
    satchel("specialize", folder, "--layout", "int8", "--threads", 1, "--quiet")
    special = open_bundle(folder)
    assert special.specialized is not None
    assert special.specialized.variant("prefill") == "prefill_int8"
    kinds = {
        phase: {node.op_type for node in onnx.load(folder / made.file, load_external_data=False).graph.node}
        for phase, made in special.specialized.graphs.items()
    }
    assert "MatMulIntegerToFloat" in kinds["prefill"]
    assert "MatMulIntegerToFloat" not in kinds["decode"]
    portable, engine = Engine.open(Bundle(folder, bundle.manifest), threads=1), Engine.open(special, threads=1)
    wanted, found = (e.prefill(e.new_state(32), IDS).copy() for e in (portable, engine))
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.2, "int8 rounds a little, and not nothing"
    assert (engine.scored_by, portable.scored_by) == ("prefill_int8", None)
    np.testing.assert_allclose(engine.score(IDS)[-1], found, rtol=0, atol=1e-5 * np.abs(found).max())
    satchel("verify", folder, "--threads", 1)
    satchel("specialize", folder, "--remove")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_weights_that_are_wrong_are_not_kept(satchel: Satchel, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    rint = np.rint
    monkeypatch.setattr(layouts.np, "rint", lambda values: -rint(values))
    before = {path.name: path.read_bytes() for path in bundle.folder.iterdir()}
    said = satchel("specialize", bundle.folder, "--layout", "int8", "--threads", 1, "--quiet", code=2).err
    assert "differ from the portable ones" in said
    assert {path.name: path.read_bytes() for path in bundle.folder.iterdir()} == before


def test_graphs_that_do_not_belong_together_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    manifest = read_manifest(bundle.folder)
    manifest["graphs"]["prefill"]["file"] = "decode.onnx"
    graph = onnx.load(bundle.graph_path("prefill_int8"), load_external_data=False)
    for tensor in graph.graph.initializer:
        tensor.name = tensor.name.replace(".int8", "x.int8")
    changed = tmp_path / "bundle"
    changed.mkdir()
    for path in bundle.folder.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    (changed / "prefill_int8.onnx").write_bytes(graph.SerializeToString())
    write_manifest(changed, read_manifest(bundle.folder))
    with pytest.raises(BundleError, match=r"the weight .* of prefill_int8"):
        make_weights(
            Bundle(changed, bundle.manifest), bundle.manifest.variant("prefill_int8"), tmp_path / EXPANDED_NAME
        )
