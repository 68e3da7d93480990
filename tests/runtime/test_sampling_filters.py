"""The filters over logits against those of transformers in torch, and against plain formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as theirs

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.generation_config import TRANSFORMERS_TOP_K
from satchel.runtime.generation.sampling import filters
from satchel.runtime.generation.sampling.options import SamplingOptions

VOCABULARY = 500
PROMPT_TOKENS = 30
END_TOKENS = np.array([2, 7])
NO_IDS = np.empty(0, np.int64)


def random_logits(seed: int) -> np.ndarray:
    """Logits of any spread: from nearly flat to one token that has everything; some are masked, some equal."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, (0.1, 1, 3, 10)[seed % 4], VOCABULARY).astype(np.float32)
    logits[rng.integers(0, VOCABULARY, 20)] = -np.inf
    logits[rng.integers(0, VOCABULARY, 20)] = logits[0]
    return logits


def random_ids(seed: int, count: int = PROMPT_TOKENS + 10, distinct: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, distinct, count)


def run_theirs(processors: list[theirs.LogitsProcessor], logits: np.ndarray, ids: np.ndarray = NO_IDS) -> np.ndarray:
    scores = torch.from_numpy(logits.copy())[None]
    for processor in processors:
        scores = processor(torch.from_numpy(ids.copy())[None], scores)
    return scores[0].numpy()


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def assert_same(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == np.float64
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(seed: int, penalty: float) -> None:
    logits, ids = random_logits(seed), random_ids(seed, distinct=VOCABULARY)
    expected = run_theirs([theirs.RepetitionPenaltyLogitsProcessor(penalty)], logits, ids)
    assert_same(filters.repetition_penalty(logits, ids, penalty), expected)
    assert (expected != logits).sum() > 25


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 39, 40, 41, 42, 10**9])
def test_repeated_ngrams_are_banned_as_by_transformers(seed: int, size: int) -> None:
    logits, ids = random_logits(seed), random_ids(seed, distinct=2 + seed % 4)
    expected = run_theirs([theirs.NoRepeatNGramLogitsProcessor(size)], logits, ids)
    assert_same(filters.no_repeat_ngram(logits, ids, size), expected)


def test_a_history_shorter_than_the_ngram_bans_nothing() -> None:
    logits = random_logits(1)
    for count in range(3):
        np.testing.assert_array_equal(filters.no_repeat_ngram(logits, np.zeros(count, np.int64), 3), logits)
    assert filters.no_repeat_ngram(logits, np.array([4, 4, 4]), 3)[4] == -np.inf


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("value", [0.05, 0.7, 1.0, 3.0])
def test_a_temperature_gives_the_distribution_of_transformers(seed: int, value: float) -> None:
    logits = random_logits(seed)
    expected = run_theirs([theirs.TemperatureLogitsWarper(value)], logits)
    ours = filters.temperature(logits, value)
    np.testing.assert_allclose(probabilities(ours), probabilities(expected), rtol=1e-4, atol=1e-12)
    assert ours.max() == 0


KEEPING: list[tuple[Callable[..., np.ndarray], type[theirs.LogitsProcessor], tuple[float, ...]]] = [
    (filters.top_k, theirs.TopKLogitsWarper, (1, 2, 50, VOCABULARY - 1, VOCABULARY, 10 * VOCABULARY)),
    (filters.top_p, theirs.TopPLogitsWarper, (1e-6, 0.1, 0.5, 0.9, 0.999)),
    (filters.min_p, theirs.MinPLogitsWarper, (0.0, 0.01, 0.1, 0.9, 1.0)),
    (filters.typical_p, theirs.TypicalLogitsWarper, (1e-6, 0.1, 0.5, 0.9, 0.99)),
    (filters.top_h, theirs.TopHLogitsWarper, (0.01, 0.4, 0.9)),
    (filters.epsilon_cutoff, theirs.EpsilonLogitsWarper, (1e-5, 3e-3, 0.3)),
    (filters.eta_cutoff, theirs.EtaLogitsWarper, (1e-5, 3e-3, 0.3)),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("ours", "warper", "values"), KEEPING)
def test_a_filter_keeps_what_transformers_keeps(
    ours: Callable[..., np.ndarray], warper: type[theirs.LogitsProcessor], values: tuple[float, ...], seed: int
) -> None:
    logits = random_logits(seed)
    given = logits
    if ours in (filters.top_p, filters.top_h):  # at par, transformers keeps any
        given = logits = logits + np.random.default_rng(100 + seed).normal(0, 1e-3, VOCABULARY).astype(np.float32)
    if ours is filters.top_h:  # transformers adds 0 * -inf for masked tokens: it gets numbers in their place
        given = np.maximum(logits, -1e4).astype(np.float32)
    for value in values:
        assert_same(ours(logits, value), run_theirs([warper(value)], given))


ENDS = torch.from_numpy(END_TOKENS)
RULES: dict[str, tuple[dict[str, Any], list[theirs.LogitsProcessor]]] = {
    "sequence_bias": (
        {"sequence_bias": [[[9], 2.5], [[3, 1], -4.0], [[5, 3, 8], 3.0], [[9, 9, 8], 1.0]]},
        [theirs.SequenceBiasLogitsProcessor([[[9], 2.5], [[3, 1], -4.0], [[5, 3, 8], 3.0], [[9, 9, 8], 1.0]])],
    ),
    "bad_words_ids": (
        {"bad_words_ids": [[9], [3, 1], [4, 1], [5, 3, 8], [2]]},
        [theirs.NoBadWordsLogitsProcessor([[9], [3, 1], [4, 1], [5, 3, 8], [2]], ENDS)],
    ),
    "suppress_tokens": ({"suppress_tokens": [4, 400]}, [theirs.SuppressTokensLogitsProcessor([4, 400])]),
    "begin_suppress_tokens": (
        {"begin_suppress_tokens": [4, 400]},
        [theirs.SuppressTokensAtBeginLogitsProcessor([4, 400], PROMPT_TOKENS)],
    ),
    "forced_eos_token_id": (
        {"forced_eos_token_id": [7, 9]}, [theirs.ForcedEOSTokenLogitsProcessor(PROMPT_TOKENS + 11, [7, 9])]
    ),
    "min_length": ({"min_length": PROMPT_TOKENS + 5}, [theirs.MinLengthLogitsProcessor(PROMPT_TOKENS + 5, ENDS)]),
    "exponential_decay_length_penalty": (
        {"exponential_decay_length_penalty": [4, 1.1]},
        [theirs.ExponentialDecayLengthPenalty((4, 1.1), ENDS, PROMPT_TOKENS)],
    ),
    "renormalize_logits": ({"renormalize_logits": True}, [theirs.LogitNormalization()]),
}  # fmt: skip


@pytest.mark.parametrize("count", [0, 4, 5, 10])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_on_tokens_is_that_of_transformers(rule: str, count: int) -> None:
    options, processors = RULES[rule]
    logits, ids = random_logits(5), random_ids(7, PROMPT_TOKENS + count)
    logits[END_TOKENS] = [0.5, -0.25]
    ids[-2:] = [5, 3]
    ours = filters.adjusted(logits, SamplingOptions(**options), ids, PROMPT_TOKENS, END_TOKENS, 11)
    expected = run_theirs(processors, logits, ids)
    assert_same(ours, expected)
    applies = {"begin_suppress_tokens": [0], "forced_eos_token_id": [10], "min_length": [0, 4]}
    applies["exponential_decay_length_penalty"] = [5, 10]
    assert (ours != logits).any() == (count in applies.get(rule, [0, 4, 5, 10]))


def test_a_prompt_of_one_token_is_followed_by_the_forced_one_which_counts_as_the_beginning() -> None:
    options = SamplingOptions(forced_bos_token_id=4, begin_suppress_tokens=(4, 9))
    logits = random_logits(5)
    first = filters.adjusted(logits, options, np.array([1]), 1, END_TOKENS)
    assert_same(first, run_theirs([theirs.ForcedBOSTokenLogitsProcessor(4)], logits, np.array([1])))
    second = filters.adjusted(logits, options, np.array([1, 4]), 1, END_TOKENS)
    assert np.flatnonzero(second != logits).tolist() == [4, 9]


def test_invalid_values_are_removed_as_by_transformers() -> None:
    logits = random_logits(5)
    logits[[3, 4, 5]] = np.nan, np.inf, -np.inf
    ours = filters.adjusted(logits, SamplingOptions(remove_invalid_values=True), random_ids(1), 5, END_TOKENS)
    np.testing.assert_allclose(ours, run_theirs([theirs.InfNanRemoveLogitsProcessor()], logits), rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_together_give_the_distribution_of_transformers(seed: int) -> None:
    logits, ids = random_logits(seed), random_ids(seed, distinct=VOCABULARY)
    options = SamplingOptions(
        temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, typical_p=0.95,
        repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=11, seed=1,
    )  # fmt: skip
    chain = [
        theirs.RepetitionPenaltyLogitsProcessor(1.4),
        theirs.NoRepeatNGramLogitsProcessor(2),
        theirs.MinNewTokensLengthLogitsProcessor(PROMPT_TOKENS, 11, torch.from_numpy(END_TOKENS)),
        theirs.TemperatureLogitsWarper(0.8),
        theirs.TopKLogitsWarper(40),
        theirs.TopPLogitsWarper(0.9),
        theirs.MinPLogitsWarper(0.01),
        theirs.TypicalLogitsWarper(0.95),
    ]
    expected = run_theirs(chain, logits, ids)
    row = filters.adjusted(logits, options, ids, PROMPT_TOKENS, END_TOKENS)
    assert (row[END_TOKENS] == -np.inf).all()
    found = probabilities(filters.narrowed(row, options))
    np.testing.assert_array_equal(found > 0, np.isfinite(expected))
    np.testing.assert_allclose(found, probabilities(expected), rtol=1e-5)


def test_the_default_top_k_is_that_of_transformers() -> None:
    assert GenerationConfig._get_default_generation_params()["top_k"] == TRANSFORMERS_TOP_K


def test_presence_and_frequency_count_the_new_text_alone() -> None:
    logits = np.arange(8, dtype=np.float32)
    ids = np.array([0, 1, 1, 5, 5, 6, 5])
    options = SamplingOptions(presence_penalty=0.5, frequency_penalty=0.25)
    row = filters.adjusted(logits, options, ids, 3, NO_IDS)
    np.testing.assert_array_equal(logits - row, [0, 0, 0, 0, 0, 0.5 + 3 * 0.25, 0.5 + 0.25, 0])
    rewarded = filters.adjusted(logits, SamplingOptions(frequency_penalty=-1), ids, 3, NO_IDS)
    np.testing.assert_array_equal(rewarded - logits, [0, 0, 0, 0, 0, 3, 1, 0])


def test_a_bias_moves_the_logit_by_exactly_itself_after_the_penalties() -> None:
    logits = np.array([2, 4, -1, -np.inf], np.float32)
    options = SamplingOptions(repetition_penalty=2, logit_bias={0: 3, 2: -np.inf, 3: 5})
    row = filters.adjusted(logits, options, np.array([0, 0]), 1, NO_IDS)
    np.testing.assert_array_equal(row, [2 / 2 + 3, 4, -np.inf, -np.inf])


def test_the_end_is_banned_until_the_shortest_text_is_there() -> None:
    logits, options = random_logits(1), SamplingOptions(min_new_tokens=2)
    for generated in range(4):
        row = filters.adjusted(logits, options, np.zeros(5 + generated, np.int64), 5, END_TOKENS)
        assert np.isfinite(row[END_TOKENS]).all() == (generated >= 2)
        assert (np.delete(row, END_TOKENS) == np.delete(logits, END_TOKENS)).all()


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (SamplingOptions(no_repeat_ngram_size=1), "--no-repeat-ngram-size"),
        (SamplingOptions(logit_bias=dict.fromkeys(range(4), -np.inf)), "--logit-bias"),
        (SamplingOptions(min_new_tokens=9, logit_bias={0: -np.inf, 1: -np.inf}), "--min-new-tokens and --logit-bias"),
    ],
)
def test_options_that_leave_no_token_are_refused(options: SamplingOptions, flags: str) -> None:
    with pytest.raises(PromptError, match=f"^no token is left to choose from at step 2: loosen {flags}$"):
        filters.adjusted(np.zeros(4, np.float32), options, np.arange(4), 2, np.array([2, 3]))


def spread(deviation: float, count: int = 50_000) -> np.ndarray:
    return np.random.default_rng(5).normal(0, deviation, count)


@pytest.mark.parametrize("deviation", [0.01, 2.5, 8])
@pytest.mark.parametrize("mass", [0.1, 0.9, 0.9999])
def test_top_p_of_a_large_vocabulary_keeps_the_smallest_nucleus(deviation: float, mass: float) -> None:
    logits = spread(deviation)
    order = np.argsort(-logits)
    cumulated = np.cumsum(probabilities(logits)[order])
    expected = order[: int((cumulated < mass).sum()) + 1]
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(filters.top_p(logits, mass))), np.sort(expected))


@pytest.mark.parametrize("deviation", [0.01, 2.5, 8])
@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9999])
def test_typical_p_of_a_large_vocabulary_keeps_the_most_typical(deviation: float, mass: float) -> None:
    logits = spread(deviation)
    p = probabilities(logits)
    surprise = np.abs(-np.log(p) + (p * np.log(p)).sum())
    order = np.argsort(surprise)
    expected = order[: int((np.cumsum(p[order]) < mass).sum()) + 1]
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(filters.typical_p(logits, mass))), np.sort(expected))


def test_at_par_top_p_keeps_the_lower_ids_and_top_k_all() -> None:
    logits = np.array([1, 5, 3, 3, 3, 1], np.float32)
    mass = float(probabilities(logits)[[1, 2, 3]].sum()) - 1e-6
    assert np.flatnonzero(np.isfinite(filters.top_p(logits, mass))).tolist() == [1, 2, 3]
    assert np.flatnonzero(np.isfinite(filters.top_p(np.zeros(8, np.float32), 0.45))).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(np.isfinite(filters.top_k(logits, 2))).tolist() == [1, 2, 3, 4]


NARROWING: list[tuple[Callable[..., np.ndarray], Any]] = [
    (filters.temperature, 0.5),
    (filters.top_k, 1),
    (filters.top_p, 1e-9),
    (filters.top_p, 1 - 1e-16),
    (filters.min_p, 1.0),
    (filters.typical_p, 1e-9),
    (filters.typical_p, 1 - 1e-16),
]


@pytest.mark.parametrize(("narrow", "value"), NARROWING)
def test_narrowing_always_leaves_a_token(narrow: Callable[..., np.ndarray], value: float) -> None:
    alone = np.full(5, -np.inf, np.float32)
    alone[3] = -2
    flat = np.zeros(5, np.float32)
    for logits in (alone, flat, random_logits(2)):
        kept = np.isfinite(narrow(logits, value))
        assert kept.any()
        assert not (kept & ~np.isfinite(logits)).any()


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        *[(narrow, (value,)) for narrow, value in NARROWING],
        (filters.top_k, (VOCABULARY,)),
        (filters.min_p, (0.0,)),
        (filters.repetition_penalty, (random_ids(1), 1.5)),
        (filters.count_penalties, (random_ids(1), 1.0, 0.5)),
        (filters.no_repeat_ngram, (random_ids(1), 2)),
        (filters.ban, (END_TOKENS,)),
        (filters.logit_bias, ({1: 2.0},)),
        (filters.narrowed, (SamplingOptions(temperature=1.0),)),
        (filters.adjusted, (SamplingOptions(), random_ids(1), 3, END_TOKENS)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_filter_changes_nothing_that_it_was_given(
    change: Callable[..., np.ndarray], arguments: tuple[Any, ...], dtype: type
) -> None:
    logits = random_logits(3).astype(dtype)
    before = logits.copy()
    copies = [value.copy() if isinstance(value, np.ndarray) else value for value in arguments]
    result = change(logits, *arguments)
    assert not np.shares_memory(result, logits)
    result[:] = 0
    np.testing.assert_array_equal(logits, before)
    for value, copied in zip(arguments, copies, strict=True):
        np.testing.assert_array_equal(value, copied) if isinstance(value, np.ndarray) else None


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=5e-324),
        SamplingOptions(temperature=1e308),
        SamplingOptions(temperature=1.0, repetition_penalty=5e-324),
        SamplingOptions(temperature=1.0, repetition_penalty=1e308),
        SamplingOptions(temperature=1.0, logit_bias={1: 1.7e308, 2: -1.7e308}),
        SamplingOptions(temperature=0.1, repetition_penalty=5e-324, logit_bias={1: 1.7e308}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_extreme_values_overflow_nothing(options: SamplingOptions) -> None:
    logits = np.array([3e38, 3, -3, 0, -np.inf], np.float32)
    row = filters.adjusted(logits, options, np.arange(3), 1, NO_IDS)
    p = probabilities(filters.narrowed(row, options))
    assert math.isclose(p.sum(), 1)
    assert p[4] == 0
