"""What `satchel export` makes for a target is clean for the provider of that name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.families import FAMILIES, save

from satchel.export import ExportConfig, export_bundle
from satchel.export.checking.check import check_bundle
from satchel.export.checking.report import as_text
from satchel.export.checking.tables import provider_of
from satchel.export.config import TARGETS
from satchel.graphs.providers.rules import RULES
from satchel.runtime.bundle import survey_bundle


@pytest.mark.parametrize("target", TARGETS)
def test_an_export_is_clean_for_its_provider(target: str, tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    checkpoint, folder = save(family, tmp_path / "checkpoint"), tmp_path / "bundle"
    export_bundle(checkpoint, ExportConfig(folder, target=target, max_context=family.context, certificate=False))
    result = check_bundle(survey_bundle(folder), provider_of(target))
    assert (result.errors, result.warnings) == (0, 0), as_text(result, strict=True)
    assert result.graphs
    for graph in result.graphs:
        assert graph.optimised, graph.note
        assert graph.taken + graph.host == graph.nodes
    json.dumps(result.to_json())


def test_every_target_has_rules() -> None:
    assert set(TARGETS) <= set(RULES)
