"""A loop is noticed when it spans enough tokens and repetitions, whatever its block, and not before."""

from __future__ import annotations

from itertools import chain, repeat

import numpy as np
import pytest

from satchel.runtime.generation.repeats import MAX_BLOCK, MIN_TOKENS, RepeatDetector


def ends_after(tokens: list[int], max_repeats: int = 8) -> int | None:
    """How many tokens a detector takes until it finds a loop."""
    detector = RepeatDetector(max_repeats)
    return next((place for place, token in enumerate(tokens, start=1) if detector.add(token)), None)


@pytest.mark.parametrize("block", [1, 3, 16, 40, MAX_BLOCK])
@pytest.mark.parametrize("before", [0, 7, 500])
def test_a_block_that_is_repeated_often_enough_ends_it(block: int, before: int) -> None:
    start = np.random.default_rng(0).integers(1000, 10**6, before).tolist()
    for max_repeats in (2, 8):
        whole = [*start, *chain(*repeat(range(block), 400))]
        assert ends_after(whole, max_repeats) == before + max(MIN_TOKENS, block * max_repeats)


def test_text_that_does_not_repeat_itself_exactly_goes_on() -> None:
    counting = [token for number in range(2000) for token in (5, 6, number, 7)]
    interrupted = [*chain(*repeat([*range(100), *[8] * 27], 3)), *chain(*repeat(range(MAX_BLOCK + 1), 9))]
    assert ends_after(counting) is None
    assert ends_after(interrupted) is None
