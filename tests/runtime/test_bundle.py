"""Opening a bundle: files that are missing, damaged or elsewhere, and the memory of hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from support.tiny_bundle import read_manifest, write_bundle, write_manifest

from satchel.runtime import bundle as bundle_module
from satchel.runtime.bundle import Bundle, open_bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.manifest import FileRecord, Specialized


@pytest.fixture
def folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed during the test."""
    names: list[str] = []
    original = bundle_module.sha256_of

    def counting(path: Path, advance) -> str:
        names.append(path.name)
        return original(path, advance)

    monkeypatch.setattr(bundle_module, "sha256_of", counting)
    return names


def test_a_bundle_gives_the_paths_of_its_files(folder: Path) -> None:
    bundle = open_bundle(str(folder))
    assert bundle.graph_path("decode") == folder / "decode.onnx"
    assert bundle.path("weights.bin") == folder / "weights.bin"
    with pytest.raises(BundleError, match="'other' is not listed in 'files'"):
        bundle.path("other")


def test_files_are_hashed_once_and_remembered(folder: Path, hashed: list[str]) -> None:
    open_bundle(folder)
    assert sorted(hashed) == sorted(read_manifest(folder)["files"])
    hashed.clear()
    open_bundle(folder)
    assert hashed == []


def test_only_a_file_that_changed_is_hashed_again(folder: Path, hashed: list[str]) -> None:
    open_bundle(folder)
    hashed.clear()
    os.utime(folder / "weights.bin", ns=(1, 1))
    open_bundle(folder)
    assert hashed == ["weights.bin"]


def test_a_copy_elsewhere_is_hashed_too(folder: Path, hashed: list[str]) -> None:
    open_bundle(folder)
    hashed.clear()
    open_bundle(shutil.copytree(folder, folder.with_name("copy")))
    assert len(hashed) == len(read_manifest(folder)["files"])


def test_a_file_damaged_after_it_was_seen_is_noticed(folder: Path) -> None:
    open_bundle(folder)
    content = bytearray((folder / "weights.bin").read_bytes())
    content[100] ^= 1
    (folder / "weights.bin").write_bytes(content)
    for _ in range(2):
        with pytest.raises(BundleError, match=r"weights\.bin: damaged \(.*\): copy the bundle again, or export"):
            open_bundle(folder)


def test_a_remembered_hash_does_not_hide_a_changed_manifest(folder: Path) -> None:
    open_bundle(folder)
    document = read_manifest(folder)
    document["files"]["weights.bin"]["sha256"] = "0" * 64
    write_manifest(folder, document)
    with pytest.raises(BundleError, match=r"weights\.bin: damaged"):
        open_bundle(folder)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a": 1}', b'{"a": [[1], "b"]}'])
def test_a_damaged_memory_only_means_hashing_again(folder: Path, hashed: list[str], content: bytes) -> None:
    memory = Path(os.environ["XDG_CACHE_HOME"]) / "satchel" / "hashes.json"
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    open_bundle(folder)
    assert hashed
    hashed.clear()
    open_bundle(folder)
    assert hashed == []
    assert [path.name for path in memory.parent.iterdir()] == ["hashes.json"]


def test_a_memory_that_cannot_be_written_only_means_hashing_again(
    folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "file"))
    open_bundle(folder)
    first = len(hashed)
    open_bundle(folder)
    assert len(hashed) == 2 * first > 0


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "decode.onnx").unlink()
    with pytest.raises(BundleError, match=r"decode\.onnx: missing: copy the bundle again, or export it again"):
        open_bundle(folder)


def test_a_truncated_file_is_noticed_without_hashing(folder: Path, hashed: list[str]) -> None:
    os.truncate(folder / "weights.bin", 1000)
    with pytest.raises(BundleError, match=r"weights\.bin: 1000 bytes where the manifest says \d+: copy"):
        open_bundle(folder)
    assert hashed == []


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../outside", "..", "./decode.onnx", "a\\..\\b"])
def test_a_listed_path_that_leaves_the_bundle_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"x")
    document = read_manifest(folder)
    document["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    write_manifest(folder, document)
    with pytest.raises(BundleError, match=r"manifest\.json: '.*' leads outside the bundle, which is not allowed"):
        open_bundle(folder)


def test_a_symlink_that_leaves_the_bundle_is_refused(folder: Path) -> None:
    (folder / "weights.bin").rename(folder.parent / "weights.bin")
    (folder / "weights.bin").symlink_to(folder.parent / "weights.bin")
    with pytest.raises(BundleError, match=r"'weights\.bin' leads outside the bundle.*put the file itself into"):
        open_bundle(folder)


def test_a_bundle_behind_a_symlink_opens(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert open_bundle(folder.parent / "link").manifest == open_bundle(folder).manifest


def test_a_path_that_is_no_bundle_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere: no such folder: give a folder made by satchel export"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"no manifest\.json in it: give a folder made by satchel export"):
        open_bundle(tmp_path)


def test_the_tiny_bundle_is_the_same_on_every_run(tiny: Path, tmp_path: Path) -> None:
    again = write_bundle(tmp_path / "again")
    assert read_manifest(again) == read_manifest(tiny)


def test_a_fingerprint_is_of_what_decides_the_numbers(folder: Path) -> None:
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    facts = {
        "files": sorted([name, record.sha256] for name, record in manifest.files.items()),
        "kv_cache": {
            "mode": "shared",
            "dtype": "float32",
            "layers": [dataclasses.asdict(x) for x in manifest.kv_cache.layers],
        },
        "precision": "fp32",
        "target": "cpu",
    }
    encoded = json.dumps(facts, sort_keys=True).replace(" ", "").encode()
    assert bundle.fingerprint == hashlib.sha256(encoded).hexdigest()
    shuffled = dict(reversed(manifest.files.items()))
    changed_file = dict(manifest.files) | {
        "weights.bin": dataclasses.replace(manifest.files["weights.bin"], sha256="0" * 64)
    }
    record = FileRecord(bytes=1, sha256="0" * 64)
    specialized = Specialized("1.0", "cpu", "one", (), True, False, True, {"prefill": "s/p.onnx"}, {"s/p.onnx": record})
    for change, kept in (
        ({"files": shuffled}, True),
        ({"producer": {}, "passes": ({"a": 1},), "specialized": specialized}, True),
        ({"files": changed_file}, False),
        ({"precision": "int8"}, False),
        ({"target": "gpu"}, False),
        ({"kv_cache": dataclasses.replace(manifest.kv_cache, dtype="int8")}, False),
    ):
        other = Bundle(Path("elsewhere"), dataclasses.replace(manifest, **change))
        assert (other.fingerprint == bundle.fingerprint) is kept
