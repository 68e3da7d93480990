"""Reads the text of manifest.json, and checks its version and its digest.

The digest is one hash over the manifest and so, through the hashes of the files in it, over the whole bundle.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.limits import LIMITS

FORMAT, VERSION = "satchel-bundle", 3

UNCOVERED = ("digest", "specialized")
"""Keys of a manifest that the digest does not cover: itself, and specialized graphs."""

TIMINGS = "speed"
"""The key of `certificate` that the digest does not cover: speed is not a property of the bundle."""


def manifest_digest(document: dict[str, Any]) -> str:
    """The digest of a manifest, given as parsed JSON, as 64 hex digits.

    It is the SHA-256 of the canonical JSON of all but `UNCOVERED` and `certificate.speed`: keys sorted by code point,
    no spaces, UTF-8, numbers as Python writes them (integers without a point, others with the fewest digits that
    round-trip). Raises ValueError for a string that is not valid Unicode.
    """
    import hashlib  # as in hash_cache

    covered = {key: value for key, value in document.items() if key not in UNCOVERED}
    certificate = covered.get("certificate")
    if isinstance(certificate, dict):
        covered["certificate"] = {key: value for key, value in certificate.items() if key != TIMINGS}
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def read_content(path: Path, name: str, offset: int = 0, length: int | None = None) -> bytes:
    """The bytes of a manifest: a file, or `length` bytes at `offset` of it; `name` is the file in messages.

    Raises BundleError if it cannot be read or exceeds the limit.
    """
    limit = LIMITS["manifest.json bytes"].most
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size if length is None else length
            if length <= limit:
                file.seek(offset)
                return file.read(length)
    except OSError as error:
        raise BundleError(f"{name}: cannot be read ({error.strerror}): check its permissions") from None
    raise BundleError(f"{name}: exceeds the limit of {limit:,} bytes for a manifest: do not trust this bundle")


def parse_manifest(content: bytes, name: str) -> dict[str, Any]:
    """Parse the bytes of manifest.json; `name` is the file in messages.

    Raises BundleError for invalid JSON, for any other document, and for a version other than `VERSION`.
    """
    try:
        document = strict_json.loads(content)
    except ValueError as error:
        raise BundleError(f"{name}: not valid JSON ({error}): copy the bundle or export it again") from None
    return check_version(document, name)


def check_version(document: Any, name: str) -> dict[str, Any]:
    """Check that parsed JSON is a manifest of `VERSION`, and return it. Raises BundleError."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(f"{name}: not a satchel manifest ('format' is not '{FORMAT}'): give a satchel bundle")
    found = document.get("version")
    if type(found) is int and found == VERSION:
        return document
    older = type(found) is int and 1 <= found < VERSION
    remedy = "install satchel 0.1, which reads it, or export it again" if older else "install the satchel that made it"
    raise BundleError(f"{name}: bundle version {found!r}, and this satchel reads version {VERSION}: {remedy}")


def claimed_digest(document: dict[str, Any], name: str) -> str:
    """The digest in a parsed manifest, not verified. Raises BundleError if there is none."""
    claimed = document.get("digest")
    if not isinstance(claimed, str):
        raise BundleError(f"{name}: missing key 'digest': export the bundle again with this satchel")
    return claimed


def check_digest(document: dict[str, Any], name: str) -> None:
    """Raise BundleError unless the digest in a parsed manifest is right."""
    try:
        digest = manifest_digest(document)
    except ValueError as error:  # half of a surrogate pair
        raise BundleError(f"{name}: not valid JSON ({error}): copy the bundle or export it again") from None
    if digest != claimed_digest(document, name):
        raise BundleError(f"{name}: damaged (its digest differs): copy the bundle again, or export it again")
