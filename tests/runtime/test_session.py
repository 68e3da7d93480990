"""Sessions: providers, threads, what a manifest may set, and the check against the graph that was loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from support.tiny_bundle import change_manifest, replace_file

from satchel.runtime.errors import BundleError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort import session as session_module
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.session import SessionSettings, default_threads, open_session


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def test_engines_may_differ_in_threads_and_leave_other_sessions_alone(tiny: Path) -> None:
    bundle = open_bundle(tiny)
    logits = [engine.score([5, 9, 7]) for engine in (Engine.open(bundle, threads=1), Engine.open(bundle, threads=2))]
    assert logits[0] == pytest.approx(logits[1], rel=1e-5, abs=1e-5)
    assert ort.InferenceSession(bundle.graph_path("score")).get_inputs()


def test_the_default_is_one_thread_for_each_core_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module.os, "sched_getaffinity", lambda _: {0})
    assert default_threads() == 1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_session_has_the_entries_of_the_manifest_and_stops_spinning(tiny: Path, phase: str) -> None:
    options = open_session(open_bundle(tiny), phase, SessionSettings(threads=2)).get_session_options()
    for entry in ("session.disable_prepacking", "session.force_spinning_stop"):
        assert options.get_session_config_entry(entry) == "1"


def test_an_entry_that_is_not_for_bundles_is_refused(folder: Path) -> None:
    change_manifest(
        folder, "graphs", "decode", "session", to={"session.model_external_initializers_file_folder_path": "/etc"}
    )
    with pytest.raises(
        BundleError, match=r"manifest\.json: .*decode\.session.*model_external_initializers_file_folder_path"
    ):
        Engine.open(open_bundle(folder))


@pytest.mark.parametrize("name", [b"logits", b"capacity"])
def test_a_name_that_is_not_text_is_refused(folder: Path, name: bytes) -> None:
    content = (folder / "decode.onnx").read_bytes()
    assert name in content
    replace_file(folder, "decode.onnx", content.replace(name, b"\xe3" + name[1:]))
    with pytest.raises(BundleError, match=r"decode\.onnx: .*not UTF-8"):
        Engine.open(open_bundle(folder))


def test_a_graph_with_other_inputs_or_outputs_than_the_manifest_says_is_refused(folder: Path) -> None:
    model = onnx.load(folder / "decode.onnx", load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    model.graph.output[0].name = "scores"
    replace_file(folder, "decode.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match=r"decode\.onnx: its outputs .*logits"):
        Engine.open(open_bundle(folder))


def test_a_graph_of_another_type_than_the_manifest_says_is_refused(folder: Path) -> None:
    change_manifest(folder, "graphs", "prefill", "inputs", 0, "dtype", to="int32")
    with pytest.raises(BundleError, match=r"prefill\.onnx: its inputs .*input_ids tensor\(int"):
        Engine.open(open_bundle(folder))


@pytest.mark.parametrize("reason", ["no graph", "no text"])
def test_a_graph_that_onnx_runtime_cannot_load_is_named_in_one_line(
    folder: Path, capfd: pytest.CaptureFixture, reason: str
) -> None:
    content = b"\x08\x09"  # a model of IR version 9, and nothing in it
    if reason == "no text":
        stored = (folder / "prefill.onnx").read_bytes()
        content = stored.replace(b"SimplifiedLayerNormalization", b"Simplified\xff" + b"x" * 17)
    replace_file(folder, "prefill.onnx", content)
    with pytest.raises(BundleError, match=r"prefill\.onnx: ONNX Runtime [\d.]+ cannot load it \(") as error:
        Engine.open(open_bundle(folder))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd"])
def test_a_graph_whose_weights_are_outside_the_bundle_is_refused(
    folder: Path, location: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "weights.bin", folder.parent / "weights.bin")
    model = onnx.load(folder / "prefill.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    replace_file(folder, "prefill.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match=r"prefill\.onnx: the data of 'embed' .* not part of the bundle"):
        Engine.open(open_bundle(folder))
    assert capfd.readouterr() == ("", "")
