"""OCI image layouts after ModelPack: what is written, and that the bundle comes back byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.command import Satchel
from support.full_disk import largest_file

from satchel.runtime.errors import BundleError, SatchelError
from satchel.runtime.generation.generator import Generator
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.oci import pack_oci, unpack_oci

FILE_PATH = "org.cncf.model.filepath"
TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT}
DESCRIPTOR = {
    "type": "object",
    "required": ["mediaType", "digest", "size"],
    "properties": {
        "mediaType": {"type": "string", "pattern": "^[a-z]+/[a-z0-9.+-]+$"},
        "artifactType": {"type": "string"},
        "digest": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
        "size": {"type": "integer", "minimum": 0},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "additionalProperties": False,
}
MANIFEST = {
    "type": "object",
    "required": ["schemaVersion", "mediaType", "artifactType", "config", "layers"],
    "properties": {
        "schemaVersion": {"const": 2},
        "mediaType": {"const": "application/vnd.oci.image.manifest.v1+json"},
        "artifactType": {"const": "application/vnd.cncf.model.manifest.v1+json"},
        "config": DESCRIPTOR,
        "layers": {"type": "array", "minItems": 1, "items": DESCRIPTOR},
    },
    "additionalProperties": False,
}
CONFIG = {  # the properties that ModelPack v1 defines, and no others (docs/config.md of its specification)
    "type": "object",
    "required": ["descriptor", "config", "modelfs"],
    "properties": {
        "descriptor": {
            "type": "object",
            "properties": {
                **dict.fromkeys(("family", "title", "description", "vendor", "version", "revision"), TEXT),
                **dict.fromkeys(("docURL", "sourceURL"), TEXT),
                "name": {"type": "string", "minLength": 1},
                "createdAt": {"type": "string", "format": "date-time"},
                "authors": TEXTS,
                "licenses": TEXTS,
                "datasetsURL": TEXTS,
            },
            "additionalProperties": False,
        },
        "config": {
            "type": "object",
            "properties": {
                **dict.fromkeys(("architecture", "format", "precision", "quantization"), TEXT),
                "paramSize": {"type": "string", "pattern": r"^\d+(\.\d)?[KMBTQ]$"},
                "capabilities": {
                    "type": "object",
                    "properties": {"inputTypes": TEXTS, "outputTypes": TEXTS},
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
        "modelfs": {
            "type": "object",
            "required": ["type", "diffIds"],
            "properties": {"type": {"const": "layers"}, "diffIds": {**TEXTS, "minItems": 1}},
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def layout(chatty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts") / "model"
    pack_oci(open_bundle(chatty), folder)
    return folder


@pytest.fixture
def copy(layout: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(layout, tmp_path / "copy"))


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def manifest_of(layout: Path) -> dict[str, Any]:
    (only,) = read_json(layout / "index.json")["manifests"]
    return read_json(blob(layout, only["digest"]))


def change_layers(layout: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the layers of a layout, with the digests that belong to the new manifest."""
    manifest, index = manifest_of(layout), read_json(layout / "index.json")
    change(manifest["layers"])
    content = json.dumps(manifest).encode()
    digest = hashlib.sha256(content).hexdigest()
    blob(layout, f"sha256:{digest}").write_bytes(content)
    index["manifests"][0].update(digest=f"sha256:{digest}", size=len(content))
    (layout / "index.json").write_text(json.dumps(index))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_layout_is_what_the_specifications_say(chatty: Path, layout: Path) -> None:
    assert read_json(layout / "oci-layout") == {"imageLayoutVersion": "1.0.0"}
    index = read_json(layout / "index.json")
    assert (index["schemaVersion"], index["mediaType"]) == (2, "application/vnd.oci.image.index.v1+json")
    (only,) = index["manifests"]
    jsonschema.validate(only, DESCRIPTOR)
    assert only["annotations"] == {"org.opencontainers.image.ref.name": "latest"}
    manifest = manifest_of(layout)
    jsonschema.validate(manifest, MANIFEST)
    config = read_json(blob(layout, manifest["config"]["digest"]))
    jsonschema.validate(config, CONFIG)
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    assert config["config"]["format"] == "onnx"
    for described in (only, manifest["config"], *manifest["layers"]):
        content = blob(layout, described["digest"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == described["digest"].removeprefix("sha256:")
        assert len(content) == described["size"]
    kinds = {layer["annotations"][FILE_PATH]: layer["mediaType"] for layer in manifest["layers"]}
    assert set(kinds) == set(contents(chatty))
    assert kinds["weights.bin"] == kinds["decode.onnx"] == "application/vnd.cncf.model.weight.v1.raw"
    assert kinds["manifest.json"] == "application/vnd.cncf.model.weight.config.v1.raw"


def test_the_bundle_comes_back_and_gives_the_same_text(chatty: Path, layout: Path, tmp_path: Path) -> None:
    bundle = unpack_oci(layout, tmp_path / "folder")
    assert contents(tmp_path / "folder") == contents(chatty)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    found, wanted = (Generator.open(folder, threads=1) for folder in (bundle.folder, chatty))
    assert (
        found.generate("the cat", max_new_tokens=8).token_ids == wanted.generate("the cat", max_new_tokens=8).token_ids
    )


def test_the_same_bundle_gives_the_same_bytes(chatty: Path, layout: Path, tmp_path: Path) -> None:
    pack_oci(open_bundle(chatty), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(layout)


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_a_registry_tool_copies_it(chatty: Path, layout: Path, tmp_path: Path) -> None:
    copied = f"oci:{tmp_path / 'copied'}:v1"
    command = ["skopeo", "--insecure-policy", "copy", "--quiet", f"oci:{layout}:latest", copied]
    subprocess.run(command, check=True, timeout=60)
    unpack_oci(tmp_path / "copied", tmp_path / "folder")
    assert contents(tmp_path / "folder") == contents(chatty)


def test_the_commands(chatty: Path, tmp_path: Path, satchel: Satchel) -> None:
    packed = satchel.json("pack", chatty, "--oci", "-o", tmp_path / "layout", "--json")
    assert packed["oci_manifest"] == read_json(tmp_path / "layout" / "index.json")["manifests"][0]["digest"]
    assert packed["bytes"] == sum(map(len, contents(tmp_path / "layout").values()))
    found = satchel.json("unpack", tmp_path / "layout", "-o", tmp_path / "folder", "--json")
    assert found["digest"] == packed["digest"]
    before = contents(tmp_path)
    satchel.refuses("pack", chatty, "--oci", "-o", tmp_path / "layout")
    satchel.refuses("pack", chatty, "--oci", "--force", "-o", tmp_path / "layout")
    satchel.refuses("unpack", tmp_path / "layout", "-o", tmp_path / "folder")
    assert contents(tmp_path) == before


def swapped(layers: list[dict[str, Any]]) -> None:
    layers[0]["annotations"], layers[1]["annotations"] = layers[1]["annotations"], layers[0]["annotations"]


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers[0]["annotations"].update({FILE_PATH: "../outside"}),
        lambda layers: layers[0]["annotations"].update({FILE_PATH: "/etc/passwd"}),
        lambda layers: layers[0]["annotations"].update({FILE_PATH: "aux.json"}),
        lambda layers: layers[0]["annotations"].clear(),
        lambda layers: layers.append(layers[0]),
        lambda layers: layers[0].update(mediaType="application/vnd.cncf.model.weight.v1.tar+gzip"),
        lambda layers: layers[0].update(digest="sha256:../../../etc/passwd"),
        lambda layers: layers[0].update(digest="sha256:" + "0" * 64),
        lambda layers: layers[0].update(size=layers[0]["size"] - 1),
        lambda layers: layers[0].update(size=-1),
        lambda layers: layers[0].update(size="12"),
        lambda layers: layers.pop(),
        swapped,
        list.clear,
    ],
)
def test_a_layout_that_is_wrong_is_refused(
    copy: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], object]
) -> None:
    change_layers(copy, change)
    with pytest.raises(BundleError):
        unpack_oci(copy, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"manifests": [1]}', b'{"manifests": []}', b"\xff", b"[" * 9999]
)
def test_an_index_that_is_none_is_refused(copy: Path, tmp_path: Path, content: bytes, satchel: Satchel) -> None:
    (copy / "index.json").write_bytes(content)
    satchel.refuses("unpack", copy, "-o", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_damaged_blob_is_refused(copy: Path, tmp_path: Path) -> None:
    (weights,) = [one for one in manifest_of(copy)["layers"] if one["annotations"][FILE_PATH] == "weights.bin"]
    content = bytearray(blob(copy, weights["digest"]).read_bytes())
    content[-1] ^= 1
    blob(copy, weights["digest"]).write_bytes(content)
    with pytest.raises(BundleError):
        unpack_oci(copy, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_full_disk_leaves_nothing(chatty: Path, layout: Path, tmp_path: Path) -> None:
    bundle = open_bundle(chatty)
    with largest_file(10_000), pytest.raises(SatchelError):
        pack_oci(bundle, tmp_path / "layout")
    with largest_file(10_000), pytest.raises(SatchelError):
        unpack_oci(layout, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
