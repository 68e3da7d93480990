"""bom.json: valid CycloneDX, and true."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from satchel.export import ExportConfig, export_bundle
from satchel.export.writing.bom import license_of
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest

CARD = "---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n\nlicense: mit\n"


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    folder = tmp_path_factory.mktemp("bom")
    checkpoint = Path(shutil.copytree(tiny_checkpoint, folder / "checkpoint"))
    (checkpoint / "README.md").write_text(CARD)
    export_bundle(checkpoint, ExportConfig(folder / "bundle", precision="int8"))
    return folder / "bundle"


def test_it_is_valid_by_the_schema(bundle: Path) -> None:
    text = (bundle / "bom.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_it_names_the_model_its_origin_and_its_files(bundle: Path) -> None:
    document, manifest = json.loads((bundle / "bom.json").read_text()), Manifest.read(bundle / MANIFEST_NAME)
    model = document["metadata"]["component"]
    assert model["name"] == "A model"
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert model["modelCard"]["modelParameters"]["architectureFamily"] == manifest.source.model_type
    origin = {each["name"]: each["hashes"][0]["content"] for each in model["pedigree"]["ancestors"]}
    weights = bundle.parent / "checkpoint" / "model.safetensors"
    assert origin["model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    files = {each["name"]: each["hashes"][0]["content"] for each in document["components"] if each["type"] == "file"}
    assert files.keys() == manifest.files.keys() - {"bom.json"}
    for name, digest in files.items():
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest
    tools = {each["name"]: each["version"] for each in document["metadata"]["tools"]["components"]}
    assert tools["torch"] == manifest.producer["torch"]


@pytest.mark.parametrize(
    ("card", "license_name"),
    [
        (CARD, "apache-2.0"),
        ("---\nlicense: other\nlicense_name: 'my-license'\n---\n", "my-license"),
        ("---\nlicense:\n---\n", None),
        ("# A model\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_license_is_that_of_the_card(card: str, license_name: str | None) -> None:
    assert license_of(card) == license_name
