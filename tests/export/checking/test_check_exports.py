"""What `satchel export` makes for a target is clean for the provider of that name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.exported import exported
from support.families import FAMILIES, save
from support.static_graphs import write_static

from satchel.export import ExportConfig, export_bundle
from satchel.export.checking.check import check_bundle
from satchel.export.checking.report import as_text
from satchel.export.checking.tables import provider_of
from satchel.export.config import STATIC_TARGETS, TARGETS
from satchel.runtime.bundle.reader import read_bundle


def bundle_for(target: str, place: Path, places: pytest.TempPathFactory) -> Path:
    """A tiny llama, exported for a target; a static one is written without being run."""
    if target == ExportConfig.target:
        return exported("llama", places).folder
    family, folder = FAMILIES["llama"], place / "bundle"
    checkpoint = save(family, place / "checkpoint")
    config = ExportConfig(folder, target=target, max_context=family.context, certificate=False)
    write_static(checkpoint, config) if target in STATIC_TARGETS else export_bundle(checkpoint, config)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_an_export_is_clean_for_its_provider(
    target: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    result = check_bundle(read_bundle(bundle_for(target, tmp_path, tmp_path_factory)), provider_of(target))
    assert (result.errors, result.warnings) == (0, 0), as_text(result, strict=True)
    assert len(result.graphs) == 3
    for graph in result.graphs:
        assert graph.optimized, graph.note
        assert graph.taken + graph.host == graph.nodes > 20
    json.dumps(result.to_json())


def test_the_parts_of_a_graph_that_was_cut_are_judged_each(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    config = ExportConfig(tmp_path / "bundle", target="cann", max_context=family.context, certificate=False)
    write_static(save(family, tmp_path / "checkpoint"), config, limit=60_000)
    result = check_bundle(read_bundle(config.output), provider_of("cann"))
    names = [graph.graph for graph in result.graphs]
    assert {"decode, part 1", "decode, part 2", "score of 32 tokens, part 1"} <= set(names)
    assert len({graph.file for graph in result.graphs}) == len(names)
    assert result.errors == 0, as_text(result, strict=False)
