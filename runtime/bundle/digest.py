"""One hash over all that a bundle says of itself, and so, by the hashes of its files, over the whole bundle."""

from __future__ import annotations

import json
from typing import Any

UNCOVERED = ("digest", "specialized")
"""Keys of a manifest that the digest leaves out: itself, and what a device made for itself."""

TIMINGS = "speed"
"""The key of `certificate` that is left out: a speed is no part of what a bundle is."""


def manifest_digest(document: dict[str, Any]) -> str:
    """The digest of a manifest, parsed JSON as it is in the file, as 64 hex digits.

    It is the SHA-256 of the canonical JSON of all but `UNCOVERED` and `certificate.speed`: keys sorted by code point,
    no spaces, UTF-8, numbers as Python writes them (whole ones without a point, others with the fewest digits that
    read back the same). Raises ValueError where a string is no text.
    """
    import hashlib  # as in hash_memory

    covered = {key: value for key, value in document.items() if key not in UNCOVERED}
    certificate = covered.get("certificate")
    if isinstance(certificate, dict):
        covered["certificate"] = {key: value for key, value in certificate.items() if key != TIMINGS}
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()
