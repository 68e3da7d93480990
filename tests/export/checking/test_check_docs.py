"""The document of `satchel check` has every rule as the code has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from satchel.export.checking.report import SHOWN_PLACES
from satchel.graphs.providers.facts import VERSIONS
from satchel.graphs.providers.rules import RULES

DOCUMENT = Path(__file__).parents[3] / "docs" / "checking.md"
ROW = re.compile(r"^\| ([CUP]\d\d) \| (\w+) \| (.*?) \| (.*) \|$", re.MULTILINE)


@pytest.mark.parametrize("provider", RULES)
def test_the_document_lists_every_rule(provider: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8").split(f"## Rules for {provider}\n", 1)[1].split("\n## ", 1)[0]
    assert ROW.findall(text) == [(rule.id, rule.severity, rule.title, rule.why) for rule in RULES[provider]]


def test_ids_are_unique_and_rules_are_explained() -> None:
    rules = [rule for of_provider in RULES.values() for rule in of_provider]
    assert len({rule.id for rule in rules}) == len(rules) == 44
    assert all(rule.title and rule.why and "|" not in rule.title + rule.why for rule in rules)
    assert all(rule.remedy for rule in rules if rule.severity != "info")
    assert all(rule.check.__doc__ for rule in rules)


def test_the_document_has_the_figures_of_the_code() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"up to {SHOWN_PLACES:,} places" in text
    assert f"tables for {' and '.join(VERSIONS)}" in text
