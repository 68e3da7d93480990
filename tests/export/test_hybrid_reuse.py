"""Families whose layers keep a state: what was fed is reused and saved, and onnxruntime-genai runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.exported import Exported, difference, exported
from support.families import TOLERANCE, by_family, logits_of
from support.genai import by_genai
from support.hybrid_families import HYBRIDS

from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.prefix_cache import PrefixCache

CHOSEN = ("falcon_h1", "lfm2", "mamba", "nemotron_h", "qwen3_5_text")
"""One of each kind: states beside attention or within it, a convolution alone, Mamba alone, layers without a state."""


@pytest.fixture(params=by_family({name: HYBRIDS[name] for name in CHOSEN}))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(request.param, tmp_path_factory)


def generator_of(family: Exported) -> Generator:
    manifest = family.manifest
    store = PrefixCache(manifest.kv_cache, 64 << 20, manifest.model.rotary_border, manifest.states)
    return Generator(family.engine, None, manifest.model.max_context, store)


def greedy(family: Exported, ids: list[int], count: int) -> list[int]:
    """What transformers finds, each time over the whole text."""
    text = list(ids)
    for _ in range(count):
        text.append(int(logits_of(family.reference, np.asarray(text))[-1].argmax()))
    return text[len(ids) :]


def test_a_second_turn_goes_on_here_and_from_a_file(family: Exported, tmp_path: Path) -> None:
    generator, prompt = generator_of(family), family.ids[:17].tolist()
    answer = list(generator.generate(prompt, 9).token_ids)
    assert answer == greedy(family, prompt, 9)
    fed = [*prompt, *answer][:-1]
    assert generator.save_state(tmp_path / "talk.state", [*prompt, *answer]) == len(fed)
    elsewhere = generator_of(family)
    elsewhere.load_state(tmp_path / "talk.state")
    turn = [*prompt, *answer, *family.ids[20:25].tolist()]
    wanted = greedy(family, turn, 8)
    for each in (generator, elsewhere):
        found = each.generate(turn, 8)
        assert (found.reused_tokens, list(found.token_ids)) == (len(fed), wanted)


def test_genai_finds_the_logits_of_transformers(family: Exported, tmp_path: Path) -> None:
    prompt = family.ids[:11].tolist()
    ((tokens, logits),) = by_genai(family.folder, [prompt], 12, tmp_path)
    assert tokens
    whole = logits_of(family.reference, np.asarray([*prompt, *tokens]))
    for row, wanted in zip(logits, whole[len(prompt) - 1 :], strict=False):
        assert difference(row, wanted) <= TOLERANCE
