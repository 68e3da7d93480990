"""Weights stored in half precision: the model computes in single precision with the rounded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.exported import CHUNK, PROMPT, difference, exported, stored_weights
from support.families import FAMILIES, TOLERANCE, build, logits_of, reference, save

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.engine import Engine


@pytest.mark.parametrize("name", ["qwen2", "smollm3"])
def test_float16_weights_give_the_logits_of_transformers_with_rounded_weights(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, whole = FAMILIES[name], exported(name, tmp_path_factory)
    config = ExportConfig(tmp_path / "bundle", precision="fp16", max_context=family.context, certificate=False)
    manifest = export_bundle(save(family, tmp_path / "checkpoint"), config)
    weights = stored_weights(tmp_path / "checkpoint")
    expected = logits_of(reference(family, {n: w.half().float() for n, w in weights.items()}), whole.ids)
    assert difference(expected, whole.logits) > 3 * TOLERANCE, "rounding does not show"

    engine = Engine.open(Bundle(tmp_path / "bundle", manifest), threads=1)
    assert difference(engine.score(whole.ids), expected) <= TOLERANCE
    state = engine.new_state(len(whole.ids))
    assert difference(engine.prefill(state, whole.ids[:PROMPT], chunk=CHUNK), expected[PROMPT - 1]) <= TOLERANCE
    for position in range(PROMPT, len(whole.ids)):
        assert difference(engine.decode(state, int(whole.ids[position])), expected[position]) <= TOLERANCE

    stored = sum(graph.stat().st_size for graph in [tmp_path / "bundle" / "weights.bin"])
    assert 0.45 < stored / (whole.folder / "weights.bin").stat().st_size < 0.65  # each weight starts on a memory page


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    model = build(FAMILIES["qwen2"])
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 5] = -65520.0  # the smallest that rounds beyond
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ExportError) as caught:
        config = ExportConfig(tmp_path / "bundle", precision="fp16", max_context=64, certificate=False)
        export_bundle(tmp_path / "checkpoint", config)
    for part in ("model.layers.1.mlp.down_proj.weight", "6.552e+04", "65504", "--precision fp32"):
        assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
