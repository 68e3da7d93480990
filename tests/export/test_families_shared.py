"""Layers that share keys and values have one cache, and the states and batches of such families are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.dynamic_graphs import together
from support.exported import CHUNK, PROMPT, Exported, difference, exported
from support.families import FAMILIES, TOLERANCE, by_family, logits_of, save

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.execution.kv_cache import position_bytes
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.prefix_cache import PrefixCache

LENGTHS, NEXT = (13, 5, 9), np.asarray([11, 50, 96])
OWNED = {"gemma4_text": ((2, 16), (1, 32)), "gemma3n_text": ((2, 16), (2, 16))}
"""(KV heads, head size) of the layers whose keys and values are their own: the first two of four."""


@pytest.fixture(params=by_family(OWNED, lambda name: name == "gemma4_text"))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(request.param, tmp_path_factory)


def test_a_token_costs_the_layers_that_own_a_cache(family: Exported) -> None:
    sizes = OWNED[family.family.model_type]
    layers = family.manifest.kv_cache.layers
    assert tuple((layer.kv_heads, layer.key_dim) for layer in layers) == sizes
    assert position_bytes(family.manifest.kv_cache) == sum(4 * 2 * heads * width for heads, width in sizes)


@pytest.mark.parametrize("chunk", [1, CHUNK])
def test_prompts_in_chunks_give_the_logits_of_transformers(family: Exported, chunk: int) -> None:
    state = family.engine.new_state(len(family.ids))
    found = [family.engine.prefill(state, family.ids[:PROMPT], chunk=chunk).copy()]
    found += [family.engine.decode(state, int(token)).copy() for token in family.ids[PROMPT:]]
    assert max(difference(a, b) for a, b in zip(found, family.logits[PROMPT - 1 :], strict=True)) <= TOLERANCE


def test_rows_of_a_batch_give_the_logits_of_each_alone(family: Exported) -> None:
    rows = [family.ids[3 * i : 3 * i + length] for i, length in enumerate(LENGTHS)]
    padded = together(family.folder, rows, NEXT)
    for index, (row, token) in enumerate(zip(rows, NEXT, strict=True)):
        expected = logits_of(family.reference, np.append(row, token))
        for found, wanted in zip(padded, expected[-2:], strict=True):
            assert difference(found[index], wanted) <= TOLERANCE


def test_a_second_turn_goes_on_from_a_file(family: Exported, tmp_path: Path) -> None:
    manifest = family.manifest

    def generator() -> Generator:
        store = PrefixCache(manifest.kv_cache, 64 << 20, manifest.model.rotary_border, manifest.states)
        return Generator(family.engine, None, manifest.model.max_context, store)

    here, elsewhere, prompt = generator(), generator(), family.ids[:17].tolist()
    answer = list(here.generate(prompt, 9).token_ids)
    here.save_state(tmp_path / "talk.state", [*prompt, *answer])
    elsewhere.load_state(tmp_path / "talk.state")
    turn = [*prompt, *answer, *family.ids[20:25].tolist()]
    found = elsewhere.generate(turn, 1)
    assert found.reused_tokens == len(prompt) + len(answer) - 1
    assert found.token_ids[0] == logits_of(family.reference, np.asarray(turn))[-1].argmax()


@pytest.mark.slow
def test_an_int8_cache_is_one_for_each_layer(tmp_path: Path) -> None:
    checkpoint = save(FAMILIES["gemma4_text"], tmp_path / "checkpoint")
    config = ExportConfig(tmp_path / "bundle", "fp32", kv_cache="int8", max_context=64, certificate=False)
    assert len(export_bundle(checkpoint, config).kv_cache.layers) == 4
