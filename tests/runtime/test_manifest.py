"""The manifest reader: strict about keys, types, values and the version."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bundle import read_manifest, set_at

from satchel.runtime.bundle.digest import manifest_digest
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.errors import BundleError


@pytest.fixture
def document(tiny: Path) -> dict[str, Any]:
    return read_manifest(tiny)


def test_reading_what_was_written_gives_an_equal_manifest(document: dict[str, Any]) -> None:
    manifest = Manifest.from_json(document)
    assert manifest.to_json() == document
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def variant(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A variant that a manifest may have."""
    document["files"]["fast.onnx"] = document["files"]["prefill.onnx"]
    graph = {**document["graphs"]["prefill"], "file": "fast.onnx"}
    entry = {"name": "fast", "runs": ["prefill", "decode"], "graph": graph, "requires": ["avx9"], "kernel_abi": 7}
    return {**entry, "weights": {"layout": "panels", "file": "fast.bin"}, **changes}


def test_a_variant_is_found_by_its_name(document: dict[str, Any]) -> None:
    document["variants"] = [variant(document)]
    found = Manifest.from_json(document)
    assert (found.variant("fast").requires, found.graph("fast").file) == (("avx9",), "fast.onnx")
    assert found.to_json()["variants"] == document["variants"]
    with pytest.raises(BundleError, match=r"no graph slow.*fast"):
        found.graph("slow")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "prefill"}, ""),
        ({"runs": []}, "[0].runs"),
        ({"runs": ["score"]}, "[0].runs"),
        ({"runs": ["decode", "decode"]}, "[0].runs"),
        ({"weights": {"layout": "heaps", "file": "fast.bin"}}, "[0].weights.layout"),
        ({"weights": {"layout": "int8", "file": "../fast.bin"}}, "[0].weights.file"),
        ({"weights": {"layout": "int8", "file": "weights.bin"}}, "[0].weights.file"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(document: dict[str, Any], changes: dict[str, Any], key: str) -> None:
    document["variants"] = [variant(document, **changes)]
    with pytest.raises(BundleError, match=re.escape(f"'variants{key}' must be")):
        Manifest.from_json(document)


@pytest.mark.parametrize(
    ("phases", "runs", "name", "right"),
    [
        (["prefill"], ["prefill", "decode"], "fast", True),
        (["prefill", "decode"], ["prefill"], "fast", False),
        (["prefill"], ["prefill", "decode"], "slow", False),
        (["decode"], ["prefill", "decode"], "fast", False),
    ],
)
def test_specialized_graphs_are_of_variants_that_run_the_phase(
    document: dict[str, Any], phases: list[str], runs: list[str], name: str, right: bool
) -> None:
    document["variants"] = [variant(document, runs=runs)]
    facts = {"onnxruntime": "1", "provider": "cpu", "processor": "one", "features": [], "tiled_attention": True}
    graphs = {phase: {"file": "a.onnx", "variant": name} for phase in phases}
    document["specialized"] = {**facts, "graphs": graphs, "files": {"a.onnx": document["files"]["weights.bin"]}}
    if right:
        made = Manifest.from_json(document).specialized
        assert made is not None and (made.variants, made.variant("decode")) == (("fast",), "fast")
        return
    with pytest.raises(BundleError, match=r"'specialized.graphs"):
        Manifest.from_json(document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["surprise"], 1, "unknown key 'surprise'"),
        (["kv_cache", "layers", 1, "extra"], 1, r"unknown key 'kv_cache.layers\[1\].extra'"),
        (["model", "vocab_size"], "400", "'model.vocab_size' must be a whole number, found '400'"),
        (["model", "eos_token_ids"], 2, "'model.eos_token_ids' must be a list, found '2'"),
        (["model", "eos_token_ids"], [400], "'model' must be token ids below model.vocab_size, found '400'"),
        (["graphs", "prefill"], [], "'graphs.prefill' must be an object"),
        (["graphs", "prefill", "file"], "else.onnx", "'graphs.prefill.file' must be listed in 'files'"),
        (["graphs", "score", "inputs", 0, "name"], "ids", "'graphs.score.inputs' must be .*'ids'"),
        (["graphs", "decode", "outputs", 0, "dtype"], "float8", r"'graphs.decode.outputs\[0\].dtype' must be one of"),
        (["graphs", "decode", "inputs", 2, "dtype"], "float16", "'graphs.decode.inputs' must be of one type"),
        (["kv_cache", "dtype"], "float16", "'graphs.prefill.inputs' must be of one type, that of kv_cache"),
        (["graphs", "decode", "session_of"], "score", "'graphs.decode.session_of' must be one of"),
        (["kv_cache", "layers", 0, "kv_heads"], 0, r"'kv_cache.layers\[0\].kv_heads' must be a number above 0"),
        (["kv_cache", "layers", 0, "value_dim"], 0, r"'kv_cache.layers\[0\].value_dim' must be a number above 0"),
        (["kv_cache", "layers", 0, "past_value"], None, r"'kv_cache.layers\[0\].present_value' must be null if and"),
        (["tokenizer", "kind"], "words", "'tokenizer.kind' must be one of tokenizer.json, sentencepiece"),
        (["tokenizer", "add_bos"], 1, "'tokenizer.add_bos' must be true or false"),
        (["files", "weights.bin", "sha256"], "abc", "'files.weights.bin.sha256' must be 64 lower-case hex digits"),
        (["files", "weights.bin", "bytes"], -1, "'files.weights.bin.bytes' must be a size"),
    ],
)
def test_a_wrong_entry_is_named(document: dict[str, Any], path: list[Any], value: Any, message: str) -> None:
    set_at(document, path, value)
    with pytest.raises(BundleError, match=rf"^b/manifest\.json: {message}.*: export the bundle again"):
        Manifest.from_json(document, "b/manifest.json")


@pytest.mark.parametrize("key", ["model", "graphs", "files", "tokenizer"])
def test_a_missing_entry_is_named(document: dict[str, Any], key: str) -> None:
    del document[key]
    with pytest.raises(BundleError, match=f"missing key '{key}': export the bundle again"):
        Manifest.from_json(document)


@pytest.mark.parametrize(
    ("version", "reader"),
    [*((old, "satchel 0.1,") for old in (1, 2)), *((other, "made it") for other in (9, 0, True, "1", None))],
)
def test_another_version_is_refused_and_its_reader_named(
    document: dict[str, Any], version: object, reader: str
) -> None:
    document["version"] = version
    document["surprise"] = "of the other version"
    with pytest.raises(BundleError, match=rf"bundle version {version!r}.*{reader}"):
        Manifest.from_json(document)


@pytest.mark.parametrize("change", [lambda _: [], lambda document: {**document, "format": "zip"}, lambda _: None])
def test_another_document_is_not_a_manifest(document: dict[str, Any], change: Callable[[Any], Any]) -> None:
    with pytest.raises(BundleError, match=r"not a satchel manifest .* give a satchel bundle"):
        Manifest.from_json(change(document))


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"\xff\xfe", b"[" * 100_000, b"[" * 60 + b"]" * 60, b'{"a": 1, "b": 2, "a": 1}', b'{"a": NaN}',
        b'{"a": [-Infinity]}', b'[{"a": {"b": 1, "b": 1}}]', b"1" * 5000, b'\xef\xbb\xbf{}',
        b'{"format": "satchel-bundle", "version": 3, "digest": "x", "a": "\\ud800"}',
        b'{"format": "satchel-bundle", "version": 3, "digest": "x", "a": 1e999}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json: not valid JSON .*: copy the bundle or export it again"):
        Manifest.read(tmp_path / "manifest.json")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read \(No such file"):
        Manifest.read(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["model", "vocab_size"], (1 << 24) + 1, "model.vocab_size: 16,777,217.*16,777,216"),
        (["model", "eos_token_ids"], [1] * 10_001, "model.eos_token_ids: 10,001 exceeds"),
        (["kv_cache", "layers", 0, "kv_heads"], 1 << 21, "kv_cache sizes: .* exceeds"),
        (["tokenizer", "corpus"], [{"text": "", "ids": []}] * 10_001, "tokenizer.corpus: 10,001 exceeds"),
        (["files", "weights.bin", "bytes"], 1 << 51, "bytes of a file: .* exceeds"),
    ],
)
def test_a_size_that_no_model_has_is_refused(
    document: dict[str, Any], path: list[Any], value: Any, message: str
) -> None:
    set_at(document, path, value)
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(document)


def test_a_digest_is_the_hash_of_the_canonical_manifest(document: dict[str, Any]) -> None:
    covered = {key: value for key, value in document.items() if key not in ("digest", "specialized")}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert document["digest"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_digest_leaves_out_what_a_device_made_and_timings(document: dict[str, Any]) -> None:
    document["certificate"] = {"speed": 1, "kl": 0.5}
    first = manifest_digest(document)
    assert manifest_digest({**document, "specialized": {"graphs": 1}, "digest": None}) == first
    assert manifest_digest({**document, "certificate": {"speed": 2, "kl": 0.5}}) == first
    assert manifest_digest({**document, "certificate": {"speed": 1, "kl": 0.6}}) != first
    assert manifest_digest({**document, "precision": "fp16"}) != first
    assert manifest_digest(dict(reversed(document.items()))) == first
