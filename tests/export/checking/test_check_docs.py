"""The document of `satchel check` has every rule as the code has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from satchel.graphs.providers.rules import RULES

DOCUMENT = Path(__file__).parents[3] / "docs" / "checking.md"
ROW = re.compile(r"^\| ([CUP]\d\d) \| (\w+) \| (.*?) \| (.*) \|$", re.MULTILINE)


@pytest.mark.parametrize("provider", RULES)
def test_the_document_lists_every_rule(provider: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8").split(f"## Rules for {provider}\n", 1)[1].split("\n## ", 1)[0]
    assert ROW.findall(text) == [(rule.id, rule.severity, rule.title, rule.why) for rule in RULES[provider]]
