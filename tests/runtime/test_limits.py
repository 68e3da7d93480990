"""The table of limits: each has a reason, and the document has the same table."""

from __future__ import annotations

from pathlib import Path

from satchel.runtime.bundle.limits import LIMITS

DOCUMENT = Path(__file__).parents[2] / "docs" / "bundle-format.md"


def test_the_document_has_every_limit() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = [f"| {name} | {limit.most:,} | {limit.reason} |" for name, limit in LIMITS.items()]
    assert [row for row in rows if row not in text] == []
