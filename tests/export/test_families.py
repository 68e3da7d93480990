"""Bundles of all supported families compute what transformers computes."""

from __future__ import annotations

import numpy as np
import pytest
from support.exported import CHUNK, PROMPT, Exported, difference, exported
from support.families import FAMILIES, QUICK, TOLERANCE, by_family, greedy, logits_of, reference

NEW_TOKENS, GREEDY_PROMPT = 32, 8


@pytest.fixture(params=by_family(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(request.param, tmp_path_factory)


def test_scores_of_all_positions_are_those_of_transformers(family: Exported) -> None:
    found = family.engine.score(family.ids, chunk=len(family.ids))
    assert found.shape == family.logits.shape
    assert difference(found, family.logits) <= TOLERANCE
    assert difference(family.engine.score(family.ids, chunk=CHUNK), family.logits) <= TOLERANCE


@pytest.mark.parametrize("chunk", [PROMPT, CHUNK])
def test_each_step_after_a_prompt_gives_the_logits_of_transformers(family: Exported, chunk: int) -> None:
    """Teacher-forced: the decode graph is fed the same 40 random tokens as the reference."""
    state = family.engine.new_state(len(family.ids))
    found = [family.engine.prefill(state, family.ids[:PROMPT], chunk=chunk).copy()]
    found += [family.engine.decode(state, int(token)).copy() for token in family.ids[PROMPT:]]
    errors = [difference(a, b) for a, b in zip(found, family.logits[PROMPT - 1 :], strict=True)]
    assert max(errors) <= TOLERANCE, f"the largest difference is at step {int(np.argmax(errors))}"


def test_greedy_tokens_are_those_of_transformers(family: Exported) -> None:
    prompt = family.ids[:GREEDY_PROMPT]
    expected = greedy(family.reference, prompt, NEW_TOKENS)
    path = logits_of(family.reference, np.concatenate([prompt, expected[:-1]]))[GREEDY_PROMPT - 1 :]
    second, first = np.sort(path, axis=-1)[:, -2:].T
    assert len(set(expected)) >= 8, "the seed gives a model that repeats itself: choose another"
    assert (first - second).min() > 10 * TOLERANCE * np.abs(path).max(), "a near-tie decides: choose another seed"

    state = family.engine.new_state(GREEDY_PROMPT + NEW_TOKENS)
    logits, found = family.engine.prefill(state, prompt), list[int]()
    while len(found) < NEW_TOKENS:
        found.append(int(logits.argmax()))
        logits = family.engine.decode(state, found[-1]) if len(found) < NEW_TOKENS else logits
    assert found == expected


@pytest.mark.parametrize(
    ("name", "feature"),
    by_family([(n, f) for n, family in FAMILIES.items() for f in family.features], lambda case: case[0] in QUICK),
)
def test_the_comparison_would_notice_the_loss_of_a_feature(
    name: str, feature: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family = exported(name, tmp_path_factory)
    without = reference(family.family, family.weights, without=feature)
    assert difference(logits_of(without, family.ids), family.logits) >= 100 * TOLERANCE
