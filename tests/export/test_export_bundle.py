"""What a good export leaves and says."""

from __future__ import annotations

from pathlib import Path

import onnx
from support.command import Satchel

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest


def test_a_bundle_holds_the_graphs_one_weight_file_and_what_travels_along(tiny_bundle: Path) -> None:
    manifest = Manifest.read(tiny_bundle / MANIFEST_NAME)
    names = {path.name for path in tiny_bundle.iterdir()}
    graphs = {"prefill.onnx", "decode.onnx", "score.onnx"}
    carried = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "genai_config.json", "bom.json"}
    assert names == {MANIFEST_NAME, "weights.bin", *graphs, *carried}
    assert set(manifest.files) == names - {MANIFEST_NAME}
    for name in graphs:
        model = onnx.load(tiny_bundle / name, load_external_data=False)
        large = [tensor for tensor in model.graph.initializer if tensor.ByteSize() > 1024]
        places = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
        assert large == []
        assert places == {"weights.bin"}


def test_every_weight_is_stored_once(tiny_bundle: Path) -> None:
    manifest = Manifest.read(tiny_bundle / MANIFEST_NAME)
    places: dict[int, int] = {}
    for phase in ("prefill", "decode", "score"):
        model = onnx.load(tiny_bundle / f"{phase}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                places[int(entries["offset"])] = int(entries["length"])
    stored = sum(places.values())
    tables = 2 * 128 * 8 * 4  # cos and sin, 128 positions of half a head, float32
    norms_shared = 4 * manifest.model.parameters + tables
    assert stored == norms_shared
    assert manifest.files["weights.bin"].bytes < stored + 4096 * len(places)


def test_the_same_export_twice_gives_the_same_bytes(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    export_bundle(tiny_checkpoint, ExportConfig(tmp_path / "again", precision="fp32"))
    for path in tiny_bundle.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_json_is_one_object_on_one_line(satchel: Satchel, tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = satchel.json("export", tiny_checkpoint, "-o", tmp_path / "bundle", "--precision", "fp16", "--quiet")
    manifest = Manifest.read(tmp_path / "bundle" / MANIFEST_NAME)
    assert (found["bundle"], found["precision"]) == (str(tmp_path / "bundle"), "fp16")
    assert found["parameters"] == manifest.model.parameters
    assert found["bytes"] == sum(file.bytes for file in manifest.files.values())
    assert 0 < found["seconds"] < 300
