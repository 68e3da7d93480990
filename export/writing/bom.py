"""bom.json: what a bundle is made of, as a machine-learning bill of materials in CycloneDX 1.6.

https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from satchel.runtime.bundle.manifest import Manifest

BOM_NAME = "bom.json"
SCHEMA, SPEC = "http://cyclonedx.org/schema/bom-1.6.schema.json", "1.6"
MODEL = "model"
"""The reference of the model within the document."""

SPDX = {
    name.lower(): name
    for name in ("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0",
                 "CC0-1.0", "GPL-3.0-only", "AGPL-3.0-only", "LGPL-3.0-only", "MPL-2.0", "BigScience-Bloom-RAIL-1.0")
}  # fmt: skip
"""Identifiers of licenses that models have; model cards write them in lower case. Others are given by name."""


def bom(manifest: Manifest, card: str | None) -> dict[str, Any]:
    """The bill of materials of a bundle whose manifest lists its files; `card` is the text of its model card.

    The same export gives the same document: it has no time, no random number, and no name of a folder.
    """
    tools = {"satchel": manifest.producer["satchel"], **manifest.producer}
    options = {} if manifest.provenance is None else manifest.provenance.options
    texts = [*_named(options, "calibrate"), *_named(options, "eval_text")]
    return {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application" if name == "satchel" else "library", "name": name, "version": version}
                    for name, version in tools.items()
                ]
            },
            "component": _model(manifest, card, texts),
        },
        "components": [
            *(_file(name, record.sha256) for name, record in sorted(manifest.files.items())),
            *(_data(role, name, digest) for role, name, digest in texts),
            *(_data(role, name, digest) for role, name, digest in _named(options, "recipe")),
        ],
    }


def _model(manifest: Manifest, card: str | None, texts: list[tuple[str, str, str]]) -> dict[str, Any]:
    facts = {
        "precision": manifest.precision,
        "recipe": manifest.recipe,
        "target": manifest.target,
        "parameters": manifest.model.parameters,
        "context": manifest.model.max_context,
    }
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": title_of(card or "") or manifest.source.model_type,
        "properties": [
            {"name": f"satchel:{name}", "value": str(value)} for name, value in facts.items() if value is not None
        ],
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": manifest.source.model_type,
                "datasets": [{"ref": role} for role, _, _ in texts],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            }
        },
    }
    license_name = license_of(card or "")
    if license_name is not None:
        known = SPDX.get(license_name.lower())
        component["licenses"] = [{"license": {"name": license_name} if known is None else {"id": known}}]
    origin = {} if manifest.provenance is None else manifest.provenance.source
    if origin:
        component["pedigree"] = {"ancestors": [_file(name, record.sha256) for name, record in sorted(origin.items())]}
    return component


def license_of(card: str) -> str | None:
    """The license that the front matter of a model card (README.md) names, or None."""
    front = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    found = {} if front is None else dict(re.findall(r"^(license|license_name):[ \t]*(\S.*?)[ \t]*$", front[1], re.M))
    return (found.get("license_name") or found.get("license") or "").strip("'\"") or None


def title_of(card: str) -> str | None:
    """The first heading of a model card, or None."""
    heading = re.search(r"^#[ \t]+(\S.*?)[ \t#]*$", card, re.MULTILINE)
    return None if heading is None else heading[1]


def _named(options: Mapping[str, Any], role: str) -> Iterator[tuple[str, str, str]]:
    """The file that an option names, if it does: the option, the file's name and its SHA-256."""
    value = options.get(role)
    if isinstance(value, Mapping) and value.keys() >= {"name", "sha256"}:
        yield role, value["name"], value["sha256"]


def _file(name: str, sha256: str) -> dict[str, Any]:
    return {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": sha256}]}


def _data(role: str, name: str, sha256: str) -> dict[str, Any]:
    return {**_file(name, sha256), "type": "data", "bom-ref": role}
