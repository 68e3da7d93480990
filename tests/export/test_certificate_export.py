"""An export certifies its bundle: what it measured is in the manifest, and holds wherever the bundle goes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import CONTEXT
from support.command import Satchel

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.export.ahead import Left
from satchel.export.quantize.texts import EXACT_CERTIFICATE_WINDOWS
from satchel.export.writing import certify as certify_module
from satchel.runtime.bundle.certificate import Certificate
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.kernels.library import OFF, SWITCH
from satchel.runtime.optimize.certificate_worker import FLOAT_DECODE_WINDOWS, PROMPTS


@pytest.fixture(scope="module")
def int8(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 bundle certified on a text of the user's own."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "mine.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    export_bundle(tiny_checkpoint, ExportConfig(folder / "bundle", "int8", eval_text=folder / "mine.txt"))
    return folder / "bundle"


def certificate(bundle: Path) -> Certificate:
    found = Manifest.read(bundle / "manifest.json").certificate
    assert found is not None
    return found


def test_a_float_bundle_is_certified_to_be_the_model(tiny_bundle: Path) -> None:
    found = certificate(tiny_bundle)
    for phase in (found.prefill, found.decode):
        assert phase.kl_mean is not None
        assert 0 <= phase.kl_mean < 1e-8
        assert phase.top1 == 1
        assert phase.perplexity == pytest.approx(phase.reference_perplexity, rel=1e-5)
    assert (found.windows, found.decode_windows) == (EXACT_CERTIFICATE_WINDOWS, FLOAT_DECODE_WINDOWS)
    assert (found.window_tokens, len(found.prompts)) == (CONTEXT, min(PROMPTS, found.windows))


def test_a_quantized_bundle_is_certified_with_what_it_lost(int8: Path) -> None:
    found = certificate(int8)
    for phase in (found.prefill, found.decode):
        assert phase.kl_mean is not None
        assert 1e-8 < phase.kl_mean < 0.05
    assert found.decode_windows == found.windows, "its decode has kernels of its own"


@pytest.mark.own_kernels
def test_a_quantized_bundle_is_measured_on_satchels_kernels(
    satchel: Satchel, int8: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    found = certificate(int8)
    assert (found.kernels, certificate(tiny_bundle).kernels) == ("satchel", "onnxruntime")
    shutil.copytree(int8, tmp_path / "copy")
    satchel("specialize", tmp_path / "copy", "--kernels", "satchel", "--threads", 1)
    text = int8.parent / "mine.txt"
    flags = ("--text", text, "--reference", tiny_bundle, "--windows", found.windows, "--skip", found.skip)
    flags += ("--window-tokens", found.window_tokens, "--threads", 1)
    own, portable = (satchel.json("eval", tmp_path / "copy", *flags, *more) for more in ((), ("--portable",)))
    for phase in ("prefill", "decode"):
        kl = getattr(found, phase).kl_mean
        assert kl == pytest.approx(own[phase]["kl_mean"], rel=1e-3)
        assert kl != pytest.approx(portable[phase]["kl_mean"], rel=1e-2), "satchel's kernels round otherwise"
    assert not [path for path in int8.iterdir() if path.name.startswith("specialized-")]


def test_without_satchels_kernels_the_portable_graphs_are_measured(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, OFF)
    export_bundle(tiny_checkpoint, ExportConfig(tmp_path / "bundle", "int4", effort="quick"))
    assert certificate(tmp_path / "bundle").kernels == "onnxruntime"


def test_a_text_of_one_s_own_is_measured_on(int8: Path) -> None:
    text = certificate(int8).text
    assert text is not None
    content = (int8.parent / "mine.txt").read_bytes()
    assert (text.name, text.sha256) == ("mine.txt", hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("bundle", ["tiny_bundle", "int8"])
def test_it_holds_where_it_was_made_and_in_another_folder(
    satchel: Satchel, bundle: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made = request.getfixturevalue(bundle)
    shutil.copytree(made, tmp_path / "elsewhere" / "copy")
    for folder in (made, tmp_path / "elsewhere" / "copy"):
        assert satchel("verify", folder, "--threads", 1).out.splitlines()[-1] == "OK"


def test_no_certificate_is_none(satchel: Satchel, tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("-o", tmp_path / "bundle", "--precision", "fp32", "--no-certificate", "--quiet")
    assert satchel.json("export", tiny_checkpoint, *flags)["kl"] is None
    assert Manifest.read(tmp_path / "bundle" / "manifest.json").certificate is None
    said = satchel.refuses("verify", tmp_path / "bundle", "--threads", 1, "--quiet")
    assert "has no certificate: export it again without --no-certificate" in said


def test_the_process_that_measures_ends_with_the_export(int8: Path, tmp_path: Path) -> None:
    shutil.copytree(int8, tmp_path / "copy")
    command, given = [sys.executable, "-m", certify_module.WORKER], [str(tmp_path / "copy"), str(tmp_path / "w"), None]
    done = subprocess.run(command, input=json.dumps(given) + "\n", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert "ended" in done.stderr
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in int8.iterdir()}


def test_a_bundle_that_cannot_be_measured_is_not_published(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certify_module, "WINDOWS", "elsewhere.npy")  # the process that measures looks for its own name
    with pytest.raises(ExportError, match=r"windows\.npy"):
        export_bundle(tiny_checkpoint, ExportConfig(tmp_path / "bundle", precision="fp32"))
    assert list(tmp_path.iterdir()) == []


def test_the_reference_stops_with_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def run(self, progress: Callable[[int], object]) -> None:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                progress(1)

    monkeypatch.setattr(certify_module, "Flow", Endless)
    monkeypatch.setattr(certify_module, "_batch", lambda *_: 1)
    model: Any = None
    with certify_module.reference_ahead(model, np.zeros((1, 8), np.int64), tmp_path / "work") as reference:
        assert reference is not None
    assert isinstance(reference.exception(timeout=0), Left)


def test_a_reference_that_fails_is_the_exports_error(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(certify_module, "_batch", full)
    with pytest.raises(ExportError, match="No space left"):
        export_bundle(tiny_checkpoint, ExportConfig(tmp_path / "bundle", precision="fp32"))
    assert list(tmp_path.iterdir()) == []
