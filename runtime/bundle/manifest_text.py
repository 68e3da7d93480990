"""Reads manifest.json up to the point where its digest is known to be right, and nothing further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.digest import manifest_digest
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.limits import LIMITS


def read_bytes(path: Path) -> bytes:
    """The bytes of a manifest file. Raises BundleError where it cannot be read or is longer than any manifest."""
    most = LIMITS["manifest.json bytes"].most
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}): give a folder made by satchel export") from None
    if len(content) > most:
        raise BundleError(f"{path}: more than the {most:,} bytes that a manifest may have: do not trust this bundle")
    return content


def parse_document(content: bytes, name: str) -> Any:
    """Parse a manifest's JSON; `name` is the file that messages name. Raises BundleError."""
    try:
        return strict_json.loads(content)
    except ValueError as error:
        raise BundleError(f"{name}: not valid JSON ({error}): copy the bundle or export it again") from None


def check_digest(document: Any, version: int, name: str) -> str | None:
    """The digest of a manifest as it stands in the file, once it is found right.

    None for a document of another version than `version`: 1 had no digest. Raises BundleError.
    """
    claimed = claimed_digest(document, version, name)
    if claimed is not None and true_digest(document, name) != claimed:
        raise BundleError(f"{name}: damaged (its digest differs): copy the bundle again, or export it again")
    return claimed


def claimed_digest(document: Any, version: int, name: str) -> str | None:
    """The digest that a manifest of `version` must have, as it stands there. Raises BundleError where it is missing."""
    if not isinstance(document, dict) or "format" not in document or document.get("version") != version:
        return None
    claimed = document.get("digest")
    if not isinstance(claimed, str):
        raise BundleError(f"{name}: missing key 'digest': export the bundle again with this satchel")
    return claimed


def true_digest(document: dict[str, Any], name: str) -> str:
    """The digest that a document should have. Raises BundleError where a string or a number in it is none."""
    try:
        return manifest_digest(document)
    except ValueError as error:  # half of a surrogate pair
        raise BundleError(f"{name}: not valid JSON ({error}): copy the bundle or export it again") from None
