"""Families whose layers keep a state: prompts in odd pieces and rows of a batch are as transformers computes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.exported import PROMPT, Exported, difference, exported
from support.families import FAMILIES, STATE, TOLERANCE, by_family, logits_of, reference, save
from support.hybrid_families import HYBRIDS

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.export.checkpoint import open_checkpoint
from satchel.export.recipes import load_recipe
from satchel.export.recipes.fit import fit_recipe

CUTS = (1, 2, 9, 1, 7)
"""Tokens of each piece of a prompt: fewer and more than a convolution is wide."""

LENGTHS, STEPS = (13, 1, 7), 3
"""Tokens of the prompts of a batch, and decode steps of all of them together."""


@pytest.fixture(params=by_family(HYBRIDS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(request.param, tmp_path_factory)


def test_a_prompt_in_odd_pieces_gives_the_logits_of_transformers(family: Exported) -> None:
    state, fed = family.engine.new_state(PROMPT), 0
    for count in CUTS:
        logits = family.engine.prefill(state, family.ids[fed : fed + count])
        fed += count
        assert difference(logits, family.logits[fed - 1]) <= TOLERANCE
    assert fed == PROMPT


def test_rows_of_a_batch_give_the_logits_of_each_alone(family: Exported) -> None:
    rows = family.engine.new_batch(len(LENGTHS), max(LENGTHS) + STEPS)
    texts = [family.ids[3 * row : 3 * row + length] for row, length in enumerate(LENGTHS)]
    for ids in texts:
        family.engine.prefill(rows.add(), ids)
    for step in range(STEPS):
        fed = [11 + row + 7 * step for row in range(len(texts))]
        rows.decode(fed)
        texts = [np.append(ids, token) for ids, token in zip(texts, fed, strict=True)]
        for row, ids in enumerate(texts):
            assert difference(rows.logits[row], logits_of(family.reference, ids)[-1]) <= TOLERANCE


def test_states_carry_a_tenth_of_the_variance_of_the_logits(family: Exported) -> None:
    """So that a comparison of logits is one of states too."""
    without = logits_of(reference(family.family, family.weights, STATE), family.ids)
    assert np.square(without - family.logits).mean() >= 0.1 * family.logits.var()


@pytest.mark.parametrize(
    ("name", "changes", "facts"),
    [
        ("lfm2", {"layer_types": ["full_attention", "conv", "conv", "conv"]}, ("layers.0.self_attn", "full_attention")),
        ("lfm2", {"layer_types": ["conv"] * 4}, ("layers.2.conv", "calls conv")),
        ("lfm2", {"layer_types": ["conv"] * 3}, ("num_hidden_layers",)),
        ("mamba2", {"n_groups": 1}, ("conv1d", "shape")),
    ],
)
def test_a_config_of_other_layers_than_the_weights_have_is_refused_in_one_line(
    name: str, changes: dict[str, object], facts: tuple[str, ...], tmp_path: Path
) -> None:
    path = save(FAMILIES[name], tmp_path / "checkpoint") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ExportError) as caught:
        export_bundle(path.parent, ExportConfig(tmp_path / "bundle", "fp32", max_context=32, certificate=False))
    message = str(caught.value)
    assert "\n" not in message
    assert all(fact in message for fact in facts), message
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("target", ["cuda", "cann"])
@pytest.mark.parametrize(
    ("name", "what"),
    [("lfm2", "convolutions"), pytest.param("qwen3_5_text", "convolutions", marks=pytest.mark.slow)],
)
def test_a_target_without_kernels_for_states_is_refused_by_name(
    name: str, what: str, target: str, tmp_path: Path
) -> None:
    checkpoint = save(FAMILIES[name], tmp_path / "checkpoint")
    context = FAMILIES[name].context
    config = ExportConfig(tmp_path / "bundle", "fp16", target=target, max_context=context, certificate=False)
    with pytest.raises(ExportError, match=rf"{what}.*--target {target}.*--target cpu"):
        export_bundle(checkpoint, config)


@pytest.mark.parametrize(("name", "eights"), [("lfm2", 7), ("qwen3_5_text", 7), ("llama", 0)])
def test_int4_keeps_attention_and_what_recurrences_put_out_at_8_bits(name: str, eights: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(FAMILIES[name], tmp_path))
    recipe = fit_recipe(load_recipe("int4"), checkpoint)
    names = [key.removesuffix(".weight") for key, lazy in checkpoint.weights.items() if len(lazy.dims) == 2]
    chosen = {layer: rule for layer in names if (rule := recipe.rule(layer, "linear")) is not None}
    kept = [layer for layer, rule in chosen.items() if rule.bits == 8]
    assert len(kept) == eights, kept
    assert all("self_attn" in layer or layer.endswith("out_proj") for layer in kept)
