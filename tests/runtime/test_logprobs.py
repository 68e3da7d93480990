"""Log-probabilities of chosen tokens, of the most likely ones, and of a prompt."""

from __future__ import annotations

import math

import numpy as np
import pytest

from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.generation.sampling.logprobs import TokenLogprob, log_probabilities, prompt_log_probabilities

VOCABULARY = 300
LOGITS = np.random.default_rng(2).normal(0, 4, (5, VOCABULARY)).astype(np.float32)


def plain(logits: np.ndarray) -> list[float]:
    """The log-softmax, one number at a time."""
    values = [float(value) for value in logits]
    total = math.fsum(math.exp(value) for value in values)
    return [value - math.log(total) for value in values]


def assert_is(found: TokenLogprob | None, logits: np.ndarray, token: int, top_n: int) -> None:
    assert found is not None
    expected = plain(logits)
    best = sorted(range(len(expected)), key=lambda i: (-expected[i], i))[:top_n]
    assert found.token == token
    assert found.logprob == pytest.approx(expected[token], rel=1e-12)
    assert [i for i, _ in found.top] == best
    assert [value for _, value in found.top] == pytest.approx([expected[i] for i in best], rel=1e-12)


@pytest.mark.parametrize("top_n", [0, 1, 5, VOCABULARY, VOCABULARY + 9])
@pytest.mark.parametrize("token", [0, 77, VOCABULARY - 1])
def test_log_probabilities_are_those_of_a_plain_softmax(token: int, top_n: int) -> None:
    before = LOGITS.copy()
    for logits in LOGITS:
        assert_is(log_probabilities(logits, token, top_n), logits, token, top_n)
    np.testing.assert_array_equal(LOGITS, before)


def test_at_par_the_lower_id_comes_first() -> None:
    logits = np.array([1, 3, 2, 3, 3, 2], np.float32)
    assert [token for token, _ in log_probabilities(logits, 0, 2).top] == [1, 3]
    assert [token for token, _ in log_probabilities(logits, 0, 4).top] == [1, 3, 4, 2]


@pytest.mark.filterwarnings("error")
def test_large_and_masked_logits_overflow_nothing() -> None:
    found = log_probabilities(np.array([3e38, -3e38, -np.inf, 3e38], np.float32), 2, 3)
    assert found.logprob == -math.inf
    assert found.top == ((0, -math.log(2)), (3, -math.log(2)), (1, pytest.approx(-6e38)))


@pytest.mark.parametrize("top_n", [0, 3])
def test_each_prompt_token_is_judged_by_the_logits_before_it(top_n: int) -> None:
    ids = [7, 299, 0, 12, 7]
    first, *others = prompt_log_probabilities(LOGITS, np.array(ids), top_n)
    assert first is None
    assert len(others) == 4
    for position, found in enumerate(others, start=1):
        assert_is(found, LOGITS[position - 1], ids[position], top_n)


def test_what_has_no_log_probability_is_refused() -> None:
    wrong = LOGITS.copy()
    wrong[2, 9] = np.nan
    with pytest.raises(BundleError, match=r"prompt position 2 .*NaN at token 9"):
        prompt_log_probabilities(wrong, [1] * 5, 0)
    with pytest.raises(BundleError, match="NaN at token 9"):
        log_probabilities(wrong[2], 1, 0)
    for token in (-1, VOCABULARY):
        with pytest.raises(PromptError, match=rf"token id {token} .* 0 to 299"):
            log_probabilities(LOGITS[0], token, 0)
    with pytest.raises(PromptError, match="-1 most likely"):
        log_probabilities(LOGITS[0], 1, -1)
    with pytest.raises(PromptError, match="5 tokens for a prompt of 4"):
        prompt_log_probabilities(LOGITS, [1] * 4, 0)
