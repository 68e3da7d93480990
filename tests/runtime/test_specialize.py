"""Specialized bundles: the same logits from mapped weights, where they fit; the portable graphs everywhere else."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command import Satchel
from support.specialized import IDS, change, files, logits
from support.tiny_bundle import change_manifest, read_manifest, write_bundle, write_manifest

from satchel.runtime.bundle import onnx_wire
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, SatchelError, SatchelWarning
from satchel.runtime.execution.engine import Engine, open_engine
from satchel.runtime.optimize import specialize, trials
from satchel.runtime.ort import session
from satchel.runtime.ort.attention import PLAIN_ATTENTION
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.session import SessionSettings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_bundle(tmp_path / "bundle")
    manifest = read_manifest(folder)
    for graph in filter(None, manifest["graphs"].values()):
        graph["session"] = {}  # weights are packed
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def made(folder: Path) -> Path:
    specialize.specialize(open_bundle(folder), threads=1)
    return folder


def test_the_logits_are_the_same(made: Path) -> None:
    bundle = open_bundle(made)
    assert bundle.specialized is not None
    np.testing.assert_allclose(logits(bundle), logits(Bundle(made, bundle.manifest)), rtol=0, atol=1e-5)


def test_sessions_open_the_specialized_graphs_and_lean_ones_the_portable(made: Path) -> None:
    bundle = open_bundle(made)
    for graph in (made.file for made in bundle.specialized.graphs.values()):  # type: ignore[union-attr]
        (made / graph).write_bytes(b"\x08\x09")  # a model of IR version 9, and nothing in it
    with pytest.raises(BundleError, match=f"{bundle.specialized.graphs['prefill'].file}: ONNX Runtime"):  # type: ignore[union-attr]
        Engine.open(bundle, threads=1)
    assert np.isfinite(open_engine(bundle, SessionSettings(threads=1, lean=True)).score(IDS)).all()


def test_packed_weights_are_mapped_and_stored_once(made: Path) -> None:
    specialized = open_bundle(made).specialized
    assert specialized is not None
    entries = [onnx_wire.external_data((made / graph.file).read_bytes()) for graph in specialized.graphs.values()]
    packed = [sorted(e[k] for e in found for k in e if k.startswith("prepacked_")) for found in entries]
    assert packed[0], "no weight was packed"
    assert packed[0] == packed[1], "the phases do not share what is packed"
    locations = {entry["location"] for found in entries for entry in found}
    assert locations == {"weights.bin", next(name for name in specialized.files if name.endswith(".bin"))}


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ({"onnxruntime": "1.0.0"}, "for ONNX Runtime 1.0.0 and this is"),
        ({"features": ["z80"], "processor": "Zilog"}, r"for another processor \(Zilog\)"),
        ("damaged", r"\.bin: damaged"),
        ("missing", r"\.bin: missing"),
        ("outside", "leads outside the bundle"),
    ],
)
def test_elsewhere_and_with_other_files_the_portable_graphs_run(made: Path, why: Any, reason: str) -> None:
    specialized = read_manifest(made)["specialized"]
    path = made / next(name for name in specialized["files"] if name.endswith(".bin"))
    if why == "damaged":
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif why == "missing":
        path.unlink()
    elif why == "outside":
        shutil.copy(made / "weights.bin", made.parent / "outside.bin")
        change(made, files=specialized["files"] | {"../outside.bin": read_manifest(made)["files"]["weights.bin"]})
    else:
        change(made, **why)
    with pytest.warns(SatchelWarning, match=f"the portable graphs run, since .*{reason}"):
        bundle = open_bundle(made)
    assert bundle.specialized is None
    assert np.isfinite(logits(bundle)).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [("graphs", {}), ("graphs", {"prefill": "a", "decode": "b"}), ("files", {"x": {"bytes": -1, "sha256": "0" * 64}})],
)
def test_a_manifest_that_contradicts_itself_is_refused(made: Path, key: str, value: Any) -> None:
    change(made, **{key: value})
    with pytest.raises(BundleError, match=f"'specialized.{key}"):
        open_bundle(made)


def test_a_folder_that_cannot_be_written_is_left_alone(
    satchel: Satchel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    before = files(folder)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert "Read-only file system" in satchel.refuses("specialize", folder, "--threads", 1, "--quiet")
    assert files(folder) == before


def test_run_makes_a_bundle_ready(satchel: Satchel, folder: Path) -> None:
    satchel("run", folder, "cat", "--specialize", "--max-new-tokens", 2, "--threads", 1)
    assert open_bundle(folder).specialized is not None


def test_a_ready_bundle_is_made_again_only_when_asked(satchel: Satchel, folder: Path) -> None:
    command = ("specialize", folder, "--threads", 1, "--quiet")
    first = satchel.json(*command)
    assert (first["made"], first["bundle"]) == (True, str(folder))
    assert first["specialized"] == read_manifest(folder)["specialized"]
    assert not satchel.json(*command)["made"]
    asked = satchel.json(*command, "--layout", "stored", "--kernels", "onnxruntime")
    assert not asked["made"], "it is what these ask for"
    assert satchel.json(*command, "--force")["made"]
    found = satchel.json("specialize", folder, "--remove", "--quiet")
    assert (found["specialized"], found["bytes"]) == (None, 0)


def test_graphs_that_differ_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(folder)
    relocate = specialize.relocate

    def spoil(saved: Path, graph: Path, store: Any) -> None:
        relocate(saved, graph, store)
        store.file.flush()
        content = Path(store.file.name).read_bytes()
        Path(store.file.name).write_bytes(bytes(len(content)))

    monkeypatch.setattr(specialize, "relocate", spoil)
    with pytest.raises(SatchelError, match="differ from the portable ones"):
        specialize.specialize(open_bundle(folder), threads=1)
    assert files(folder) == before


def test_an_interruption_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = files(folder)
    for step in ("save_optimized", "check", "_write_manifest"):
        monkeypatch.setattr(specialize, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            specialize.specialize(open_bundle(folder), threads=1)
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        assert files(folder) == before, step


@pytest.mark.parametrize("layout", ["int8", "groups"])
def test_a_layout_that_the_weights_do_not_allow_is_refused(satchel: Satchel, folder: Path, layout: str) -> None:
    before = files(folder)
    assert f"layout {layout}: choose one of: stored" in satchel.refuses("specialize", folder, "--layout", layout)
    assert files(folder) == before


def test_a_full_disk_is_said_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, before = shutil.disk_usage(folder), files(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(SatchelError, match=r"needs up to .* MiB .* 0 MiB are free"):
        specialize.specialize(open_bundle(folder), threads=1)
    assert files(folder) == before


def test_where_phases_share_a_session_there_is_one_graph(folder: Path) -> None:
    change_manifest(folder, "graphs", "decode", "session_of", to="prefill")
    specialize.specialize(open_bundle(folder), threads=1)
    bundle = open_bundle(folder)
    assert set(bundle.specialized.graphs) == {"prefill"}  # type: ignore[union-attr]
    assert len(set(map(id, Engine.open(bundle, threads=1).sessions))) == 1
    np.testing.assert_allclose(logits(bundle), logits(Bundle(folder, bundle.manifest)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tiled", [True, False])
def test_the_faster_attention_is_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch, tiled: bool) -> None:
    monkeypatch.setattr(trials, "prefill_seconds", lambda *_: [1.0, 0.96 if tiled else 0.94])
    specialize.specialize(open_bundle(folder), threads=1)
    seen = []
    started = session._started

    def noting(*arguments: Any) -> Any:
        seen.append(os.environ.get(PLAIN_ATTENTION))
        return started(*arguments)

    monkeypatch.setattr(session, "_started", noting)
    Engine.open(open_bundle(folder), threads=1)
    assert seen == [None if tiled else "1"] * 2
    assert PLAIN_ATTENTION not in os.environ
    monkeypatch.setenv(PLAIN_ATTENTION, "0")
    Engine.open(open_bundle(folder), threads=1)
    assert seen[2:] == ["0"] * 2, "what the user has set stays"


def test_two_threads_that_open_bundles_get_the_attention_of_each(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(made)
    plain, tiled = (
        dataclasses.replace(bundle, specialized=dataclasses.replace(bundle.specialized, tiled_attention=tiled))
        for tiled in (False, True)
    )
    wanted, seen = threading.local(), set()
    started = session._started

    def noting(*arguments: Any) -> Any:
        before = os.environ.get(PLAIN_ATTENTION)
        opened = started(*arguments)
        time.sleep(0.01)  # another thread may change the variable meanwhile
        seen.add((wanted.name, before, os.environ.get(PLAIN_ATTENTION)))
        return opened

    def opens(name: str, of: Bundle) -> None:
        wanted.name = name
        for _ in range(8):
            session.open_session(of, "prefill", SessionSettings(threads=1))

    monkeypatch.setattr(session, "_started", noting)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(opens, ["plain", "tiled"] * 2, [plain, tiled] * 2))
    assert seen == {("plain", "1", "1"), ("tiled", None, None)}
    assert PLAIN_ATTENTION not in os.environ
