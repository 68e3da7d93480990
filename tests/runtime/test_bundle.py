"""Opening a bundle: files that are missing, damaged or elsewhere, and the memory of hashes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from support.tiny_bundle import change_manifest, read_manifest, record

from satchel.runtime.bundle import reader as bundle_module
from satchel.runtime.bundle.manifest import FileRecord, PreparedGraph, Specialized
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.ort.open_bundle import open_bundle


@pytest.fixture
def folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed during the test."""
    names: list[str] = []
    original = bundle_module.sha256_of

    def counting(path: Path, advance, offset: int = 0, length: int | None = None) -> str:
        names.append(path.name)
        return original(path, advance, offset, length)

    monkeypatch.setattr(bundle_module, "sha256_of", counting)
    return names


def add_to_manifest(folder: Path, name: str, content: bytes) -> None:
    change_manifest(folder, "files", name, to=record(content))


def test_files_are_hashed_once_and_again_where_they_changed_or_were_copied(folder: Path, hashed: list[str]) -> None:
    open_bundle(folder)
    assert sorted(hashed) == sorted(read_manifest(folder)["files"])
    hashed.clear()
    open_bundle(folder)
    assert hashed == []
    os.utime(folder / "weights.bin", ns=(1, 1))
    open_bundle(folder)
    assert hashed == ["weights.bin"]
    open_bundle(shutil.copytree(folder, folder.with_name("copy")))
    assert len(hashed) == 1 + len(read_manifest(folder)["files"])


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
    change_manifest(folder, "files", "weights.bin", "sha256", to="0" * 64)
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
    with pytest.raises(BundleError, match=r"weights\.bin: 1000 bytes, .* \d+: copy"):
        open_bundle(folder)
    assert hashed == []


OUTSIDE = ["../outside", "/etc/passwd", "sub/../../outside", "..", ".", "", "./decode.onnx", "a\\..\\b", "a\0b", "C:x"]


@pytest.mark.parametrize("name", [*OUTSIDE, "x" * 1025])
def test_a_listed_path_that_leaves_the_bundle_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"x")
    add_to_manifest(folder, name, b"x")
    with pytest.raises(BundleError, match=r"manifest\.json: '.*' leads outside the bundle, which is not allowed"):
        open_bundle(folder)


@pytest.mark.parametrize(
    "name", ["con", "sub/NUL.bin", "Lpt1 .x", "com³", "a.", "sub /a", "a?b", 'a"b', "a|b", "<a>", "*"]
)
def test_a_listed_name_that_windows_cannot_have_is_refused(folder: Path, name: str) -> None:
    add_to_manifest(folder, name, b"x")
    with pytest.raises(BundleError, match=r"manifest\.json: .* is not a file name on Windows"):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["cone.bin", "sub/null", "com10", "a.b.c", ".a", "con-1", "猫"])
def test_names_that_only_look_like_those_are_allowed(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    add_to_manifest(folder, name, b"x")
    assert name in open_bundle(folder).manifest.files


@pytest.mark.parametrize("target", ["../elsewhere", "real.bin"])
@pytest.mark.parametrize("name", ["weights.bin", "manifest.json"])
def test_a_link_in_a_bundle_is_refused_wherever_it_leads(folder: Path, name: str, target: str) -> None:
    (folder / name).rename(folder / target)
    (folder / name).symlink_to(folder / target)
    with pytest.raises(BundleError, match=rf"{name}: a link, which is not allowed in a bundle: put the file"):
        open_bundle(folder)


def test_a_linked_folder_in_a_bundle_is_refused(folder: Path) -> None:
    (folder.parent / "real").mkdir()
    (folder.parent / "real" / "x").write_bytes(b"x")
    (folder / "sub").symlink_to(folder.parent / "real")
    add_to_manifest(folder, "sub/x", b"x")
    with pytest.raises(BundleError, match=r"sub: a link, which is not allowed"):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["weights.bin", "manifest.json"])
def test_a_pipe_is_no_file_and_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BundleError, match=r"not a regular file: copy the bundle again"):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["WEIGHTS.bin", "Manifest.json", "signature.json", "Signature.JSON"])
def test_names_that_some_systems_take_for_one_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x") if name != "signature.json" else None
    add_to_manifest(folder, name, b"x")
    with pytest.raises(BundleError, match=r"manifest\.json: '.*' and '.*' are the same file on some systems"):
        open_bundle(folder)


def test_a_bundle_behind_a_symlink_opens(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert open_bundle(folder.parent / "link").manifest == open_bundle(folder).manifest


def test_a_path_that_is_no_bundle_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere: no such file"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"no manifest\.json in it: give a folder made by satchel export"):
        open_bundle(tmp_path)


def test_a_fingerprint_is_of_what_decides_the_numbers(folder: Path) -> None:
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    shuffled = dict(reversed(manifest.files.items()))
    changed_file = dict(manifest.files) | {
        "weights.bin": dataclasses.replace(manifest.files["weights.bin"], sha256="0" * 64)
    }
    record = FileRecord(bytes=1, sha256="0" * 64)
    specialized = Specialized(
        "1.0", "cpu", "one", (), True, {"prefill": PreparedGraph("s/p.onnx", None)}, {"s/p.onnx": record}
    )
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


def test_a_manifest_changed_by_hand_is_noticed_before_anything_of_it_is_believed(folder: Path) -> None:
    document = read_manifest(folder)
    document["surprise"] = 1
    (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=r"manifest\.json: damaged \(its digest differs\): copy the bundle again"):
        open_bundle(folder)


def test_a_manifest_must_have_a_digest(folder: Path) -> None:
    document = read_manifest(folder)
    for change in ({"digest": None}, {"digest": 1}):
        (folder / "manifest.json").write_text(json.dumps({**document, **change}), encoding="utf-8")
        with pytest.raises(BundleError, match=r"missing key 'digest': export the bundle again"):
            open_bundle(folder)


def test_a_manifest_longer_than_any_is_not_parsed(folder: Path) -> None:
    os.truncate(folder / "manifest.json", (64 << 20) + 1)
    with pytest.raises(BundleError, match=r"manifest\.json.*67,108,864 bytes"):
        open_bundle(folder)
