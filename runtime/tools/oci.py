"""Writes a bundle as an OCI image layout after CNCF ModelPack, which registries store, and extracts it again.

Each file of the bundle is a layer of its own and as it is: nothing is compressed or archived, so that the extracted
weights can be mapped.

Sources: OCI image specification 1.1 (https://github.com/opencontainers/image-spec: image-layout.md, manifest.md), and
ModelPack v1 (https://github.com/modelpack/model-spec: docs/spec.md, docs/config.md, docs/annotations.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.archive.packed import FOLDER
from satchel.runtime.bundle.archive.zip_writer import READ_SIZE, Entry
from satchel.runtime.bundle.atomic_write import cannot_write
from satchel.runtime.bundle.errors import BundleError, SatchelError
from satchel.runtime.bundle.limits import LIMITS
from satchel.runtime.bundle.names import equal_names, impossible_on_windows, leads_outside, too_long
from satchel.runtime.bundle.reader import Bundle, check_files, read_bundle
from satchel.runtime.tools.pack import bundle_entries, staged_folder

LAYOUT_NAME, INDEX_NAME, TAG = "oci-layout", "index.json", "latest"
LAYOUT_VERSION = "1.0.0"

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MODEL = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT, WEIGHT_CONFIG, DOC = (
    f"application/vnd.cncf.model.{kind}.v1.raw" for kind in ("weight", "weight.config", "doc")
)
LAYERS = {".bin": WEIGHT, ".onnx": WEIGHT, ".onnx_adapter": WEIGHT, ".md": DOC}
"""The media type of a layer by its file's suffix; others have `WEIGHT_CONFIG`."""

FILE_PATH = "org.cncf.model.filepath"
REFERENCE = "org.opencontainers.image.ref.name"

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
SCALES = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


def is_layout(path: str | Path) -> bool:
    """Whether `path` is a folder with an OCI image layout."""
    return (Path(path) / LAYOUT_NAME).is_file()


def pack_oci(bundle: Bundle, output: Path) -> str:
    """Write an opened bundle into a new folder, as an OCI image layout with the tag `latest`.

    The same bundle gives the same bytes. Specialized graphs are left out. The folder is created atomically. Returns the
    digest of the layout's manifest, "sha256:" and 64 hex digits. Raises SatchelError if the folder exists or cannot be
    written, and BundleError if a file of the bundle cannot be read or has changed.
    """
    if os.path.lexists(output):
        raise SatchelError(f"--output {output}: already exists: choose another folder")
    try:
        with staged_folder(output) as stage:
            blobs = stage / "blobs" / "sha256"
            blobs.mkdir(parents=True)
            layers = [_layer(bundle, entry, blobs) for entry in bundle_entries(bundle)]
            config = _json(_config(bundle, [layer["digest"] for layer in layers]))
            manifest = _json(
                {
                    "schemaVersion": 2,
                    "mediaType": MANIFEST,
                    "artifactType": MODEL,
                    "config": {"mediaType": CONFIG, **_blob([config], blobs)},
                    "layers": layers,
                }
            )
            described = {"mediaType": MANIFEST, "artifactType": MODEL, **_blob([manifest], blobs)}
            tagged = {**described, "annotations": {REFERENCE: TAG}}
            index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [tagged]}
            (stage / INDEX_NAME).write_bytes(_json(index))
            (stage / LAYOUT_NAME).write_bytes(_json({"imageLayoutVersion": LAYOUT_VERSION}))
    except OSError as error:
        raise cannot_write(output, "--output", error) from None
    return str(described["digest"])


def unpack_oci(layout: Path, output: Path, *, require_signature: str | Path | None = None) -> Bundle:
    """Extract the bundle in an OCI image layout into a new folder, and check it. Returns it.

    The folder is created atomically. `require_signature` is as in `read_bundle`. Raises SatchelError if the folder
    exists or cannot be written, and BundleError if the layout has no bundle, or one that is damaged.
    """
    if os.path.lexists(output):
        raise SatchelError(f"--output {output}: already exists: choose another folder")
    layers = _layers(layout)
    try:
        with staged_folder(output) as stage:
            for name, layer in layers.items():
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                with (stage / name).open("xb") as file:
                    for block in _checked(layout, layer):
                        file.write(block)
            check_files(read_bundle(stage, require_signature=require_signature))
    except OSError as error:
        raise cannot_write(output, "--output", error) from None
    return read_bundle(output)


def _layer(bundle: Bundle, entry: Entry, blobs: Path) -> dict[str, Any]:
    """The descriptor of a file, whose blob is written."""
    name = entry.name.removeprefix(FOLDER)
    described = _blob(entry.blocks(), blobs)
    record = bundle.manifest.files.get(name)
    if record is not None and described["digest"] != f"sha256:{record.sha256}":
        raise BundleError(f"{bundle.folder / name}: damaged (its SHA-256 differs): copy the bundle again")
    kind = LAYERS.get(PurePosixPath(name).suffix, WEIGHT_CONFIG)
    return {"mediaType": kind, **described, "annotations": {FILE_PATH: name}}


def _blob(blocks: Iterator[bytes] | list[bytes], blobs: Path) -> dict[str, Any]:
    """Write a blob under the name of its digest; returns its digest and size."""
    found, size, part = hashlib.sha256(), 0, blobs / "part"
    with part.open("wb") as file:
        for block in blocks:
            found.update(block)
            size += file.write(block)
    part.replace(blobs / found.hexdigest())
    return {"digest": f"sha256:{found.hexdigest()}", "size": size}


def _config(bundle: Bundle, digests: list[str]) -> dict[str, Any]:
    manifest = bundle.manifest
    descriptor: dict[str, Any] = {"family": manifest.source.model_type, **_card(bundle)}
    config = {
        "architecture": "transformer",
        "format": "onnx",
        "paramSize": _scaled(manifest.model.parameters),
        "precision": manifest.precision,
        "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
    }
    return {"descriptor": descriptor, "config": config, "modelfs": {"type": "layers", "diffIds": digests}}


def _card(bundle: Bundle) -> dict[str, Any]:
    """The name and the licenses of the model, as the bill of materials has them."""
    if "bom.json" not in bundle.manifest.files:
        return {}
    model = json.loads(bundle.read("bom.json")).get("metadata", {}).get("component", {})
    given = [one.get("license", {}) for one in model.get("licenses", [])]
    licenses = [str(one.get("id", one.get("name"))) for one in given]
    return {"name": str(model.get("name", "model"))} | ({"licenses": licenses} if licenses else {})


def _scaled(parameters: int) -> str:
    """A number of parameters as ModelPack writes it: `134.5M`, `7B`."""
    for scale, letter in SCALES:
        if parameters >= scale:
            return f"{round(parameters / scale, 1):g}{letter}"
    return f"{round(parameters / 1000, 1):g}K"


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def _layers(layout: Path) -> dict[str, dict[str, Any]]:
    """The descriptors of the only model in a layout, by the names of their files."""
    found = [one for one in _listed(_document(layout / INDEX_NAME), "manifests") if _is_model(layout, one)]
    if len(found) != 1:
        raise BundleError(f"{layout}: {len(found)} models in its {INDEX_NAME}: give a layout with one")
    layers: dict[str, dict[str, Any]] = {}
    for layer in _listed(_parsed(layout, found[0]), "layers"):
        name, kind = layer["annotations"].get(FILE_PATH), layer["mediaType"]
        if not isinstance(name, str) or leads_outside(name) or impossible_on_windows(name) or too_long(name):
            raise BundleError(f"{layout}: {name!r} is no name for a file of a bundle: do not trust this layout")
        if not kind.endswith(".raw"):
            raise BundleError(f"{layout}: '{name}' is stored as {kind}: only layers that are files (.raw) are read")
        if equal_names([*layers, name]) is not None:
            raise BundleError(f"{layout}: two layers are '{name}': do not trust this layout")
        layers[name] = layer
    return layers


def _is_model(layout: Path, descriptor: dict[str, Any]) -> bool:
    """Whether a manifest is a model's; tools may leave `artifactType` out of the index."""
    if descriptor["mediaType"] != MANIFEST:
        return False
    return descriptor.get("artifactType", MODEL) == MODEL and _parsed(layout, descriptor).get("artifactType") == MODEL


def _listed(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The descriptors of a list, with annotations."""
    entries = document.get(key)
    if not isinstance(entries, list) or len(entries) > LIMITS["files"].most:
        raise BundleError(f"'{key}' is not a list of descriptors: give a layout made by satchel pack --oci")
    for entry in entries:
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("mediaType"), str)
            or not isinstance(entry.get("digest"), str)
            or DIGEST.fullmatch(entry["digest"]) is None
            or type(entry.get("size")) is not int
            or not isinstance(entry.setdefault("annotations", {}), dict)
        ):
            raise BundleError(f"'{key}' has {entry!r:.200}, which is no descriptor with a SHA-256 digest")
    return entries


def _parsed(layout: Path, descriptor: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in a blob."""
    if descriptor["size"] > LIMITS["OCI manifest bytes"].most:
        raise BundleError(f"{layout}: a manifest of {descriptor['size']:,} bytes: do not trust this layout")
    return _object(b"".join(_checked(layout, descriptor)), layout / descriptor["digest"])


def _document(path: Path) -> dict[str, Any]:
    most = LIMITS["OCI manifest bytes"].most
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}): give an OCI image layout") from None
    if len(content) > most:
        raise BundleError(f"{path}: exceeds {most:,} bytes: do not trust this layout")
    return _object(content, path)


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        document = strict_json.loads(content)
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON ({error}): copy the layout again") from None
    if not isinstance(document, dict):
        raise BundleError(f"{path}: not a JSON object: copy the layout again")
    return document


def _checked(layout: Path, descriptor: dict[str, Any]) -> Iterator[bytes]:
    """The blocks of a blob. Raises BundleError at the end if size or digest differ."""
    algorithm, _, name = descriptor["digest"].partition(":")
    path, rest, found = layout / "blobs" / algorithm / name, descriptor["size"], hashlib.sha256()
    try:
        with path.open("rb") as file:
            while rest > 0 and (block := file.read(min(READ_SIZE, rest))):
                rest -= len(block)
                found.update(block)
                yield block
            longer = bool(file.read(1))
    except FileNotFoundError:
        raise BundleError(f"{path}: is missing: copy the layout again") from None
    if rest or longer or found.hexdigest() != name:
        raise BundleError(f"{path}: damaged (its size or SHA-256 differs): copy the layout again")
