"""Families whose layers keep a state: prompts in odd pieces and rows of a batch are as transformers computes them."""

from __future__ import annotations

import numpy as np
import pytest
from support.exported import PROMPT, Exported, difference, exported
from support.families import STATE, TOLERANCE, by_family, logits_of, reference
from support.hybrid_families import HYBRIDS

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
