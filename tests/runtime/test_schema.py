"""docs/manifest.schema.json: of today's dataclasses, true of real manifests, and false of broken ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.tiny_bundle import read_manifest

from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.schema import as_text
from satchel.runtime.errors import BundleError
from satchel.runtime.optimize.specialize import specialize
from satchel.runtime.ort.open_bundle import open_bundle

SCHEMA = Path(__file__).parents[2] / "docs" / "manifest.schema.json"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_file_is_what_the_dataclasses_say() -> None:
    remedy = "make it again: python -m satchel.runtime.bundle.schema > docs/manifest.schema.json"
    assert SCHEMA.read_text(encoding="utf-8") == as_text(), remedy


def test_real_manifests_are_valid(validator: jsonschema.Draft202012Validator, chatty: Path, tmp_path: Path) -> None:
    validator.validate(read_manifest(chatty))
    folder = Path(shutil.copytree(chatty, tmp_path / "bundle"))
    specialize(open_bundle(folder), threads=1)
    document = read_manifest(folder)
    assert document["specialized"] is not None
    validator.validate(document)


def put(*path: Any, value: Any) -> Any:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("digest"),
        put("surprise", value=1),
        put("version", value=1),
        put("digest", value="A" * 64),
        put("model", "vocab_size", value="400"),
        put("model", "vocab_size", value=1 << 25),
        put("kv_cache", "mode", value="copied"),
        put("graphs", "prefill", "inputs", 0, "dtype", value="float8"),
        put("graphs", "decode", "session_of", value="score"),
        put("files", "weights.bin", "sha256", value="abc"),
    ],
)
def test_a_broken_manifest_is_not_valid_and_not_read(
    validator: jsonschema.Draft202012Validator, chatty: Path, tmp_path: Path, change: Any
) -> None:
    document = read_manifest(chatty)
    change(document)
    assert not validator.is_valid(document)
    (tmp_path / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError):
        Manifest.read(tmp_path / "manifest.json")
