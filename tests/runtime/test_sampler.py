"""The sampler: its draws follow the distribution, a seed decides them, and what it remembers counts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from satchel.runtime.errors import BundleError
from satchel.runtime.generation.sampling.options import SamplingOptions
from satchel.runtime.generation.sampling.sampler import Sampler, check_finite, draw

VOCABULARY = 12
END = 3
LOGITS = np.random.default_rng(3).permutation(np.linspace(-1, 1.2, VOCABULARY)).astype(np.float32)


def make(prompt: tuple[int, ...] = (1, 2), row: int = 0, **options: Any) -> Sampler:
    return Sampler(SamplingOptions(**options), [END], VOCABULARY, prompt, row)


def tokens(sampler: Sampler, count: int = 40, logits: np.ndarray = LOGITS) -> list[int]:
    return [sampler.choose(logits) for _ in range(count)]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64))
    return weights / weights.sum()


def chi_square_bound(freedom: int) -> float:
    """Exceeded by one in a thousand of samples: Wilson and Hilferty's approximation."""
    return float(freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3)


def nucleus(p: np.ndarray, mass: float) -> np.ndarray:
    order = sorted(range(len(p)), key=lambda token: -p[token])
    kept = list(itertools.takewhile(lambda n: p[order[:n]].sum() < mass, range(len(p))))
    result = np.zeros_like(p)
    result[order[: len(kept)]] = p[order[: len(kept)]]
    return result / result.sum()


def at_least(p: np.ndarray, bound: float) -> np.ndarray:
    kept = np.where(p >= bound, p, 0)
    return kept / kept.sum()


P = softmax(LOGITS)
BIAS = np.array([1, 0, 0, 0, -2, 0, 0, 0, 0, 0, 0, 0])
DISTRIBUTIONS: list[tuple[dict[str, Any], np.ndarray]] = [
    ({"temperature": 1.0}, P),
    ({"temperature": 0.5}, softmax(LOGITS / 0.5)),
    ({"temperature": 1.7}, softmax(LOGITS / 1.7)),
    ({"temperature": 1.0, "top_k": 4}, at_least(P, np.sort(P)[-4])),
    ({"temperature": 1.0, "top_p": 0.8}, nucleus(P, 0.8)),
    ({"temperature": 1.0, "min_p": 0.2}, at_least(P, 0.2 * P.max())),
    ({"temperature": 1.0, "logit_bias": {0: 1.0, 4: -2.0}}, softmax(LOGITS + BIAS)),
]


@pytest.mark.parametrize(("options", "expected"), DISTRIBUTIONS)
def test_draws_follow_the_distribution(options: dict[str, Any], expected: np.ndarray) -> None:
    count = 20_000
    found = np.bincount(tokens(make(seed=5, **options), count), minlength=VOCABULARY)
    possible = expected > 0
    assert not found[~possible].any()
    wanted = count * expected[possible]
    assert wanted.min() > 5
    assert ((found[possible] - wanted) ** 2 / wanted).sum() < chi_square_bound(int(possible.sum()) - 1)


def test_first_draws_of_different_rows_follow_the_distribution() -> None:
    count = 5_000
    first = make(temperature=1.0, seed=5)
    found = np.bincount([first.fork(row).choose(LOGITS) for row in range(count)], minlength=VOCABULARY)
    assert ((found - count * P) ** 2 / (count * P)).sum() < chi_square_bound(VOCABULARY - 1)


def test_each_draw_is_the_inverse_of_the_cumulated_probabilities_at_one_uniform_number() -> None:
    stream = np.random.Generator(np.random.PCG64(np.random.SeedSequence(9, spawn_key=(2,))))
    expected = []
    for _ in range(40):
        rest = stream.random()
        token = 0
        while (rest := rest - P[token]) > 0:
            token += 1
        expected.append(token)
    assert tokens(make(row=2, temperature=1.0, seed=9)) == expected


def test_a_draw_at_the_ends_takes_no_impossible_token() -> None:
    row = np.array([-np.inf, 0, -np.inf, 0, -2000, -np.inf])
    last = np.nextafter(1, 0)
    assert [draw(row.copy(), uniform) for uniform in (0.0, 0.25, 0.5, 0.75, last)] == [1, 1, 3, 3, 3]
    assert draw(np.array([-np.inf, -5.0, -np.inf]), last) == 1
    for weights in np.random.default_rng(1).normal(0, 3, (200, 7)):
        assert draw(np.append(weights, -2000.0), last) == 6


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 5000])
def test_a_draw_is_where_the_probabilities_of_all_tokens_before_add_up_to_the_number(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    for spread in (1.0, 20.0):
        row = rng.normal(0, spread, vocabulary)
        row[rng.random(vocabulary) < 0.3] = -np.inf
        row[rng.integers(vocabulary)] = spread
        cumulated = np.cumsum(np.exp(row - row.max()))
        for uniform in (*rng.random(200), 0.0, np.nextafter(1, 0)):
            token = draw(row.copy(), float(uniform))
            assert row[token] > -np.inf
            assert cumulated[token] - uniform * cumulated[-1] > -1e-12 * cumulated[-1]
            assert token == 0 or cumulated[token - 1] - uniform * cumulated[-1] < 1e-12 * cumulated[-1]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_or_row_others() -> None:
    options = {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.1}
    first = tokens(make(seed=7, **options))
    assert tokens(make(seed=7, **options)) == first
    assert len(set(first)) > 5
    others = [tokens(make(seed=seed, row=row, **options)) for seed, row in ((8, 0), (7, 1), (7, 2), (2**64 + 7, 0))]
    assert all(first != other for other in others)
    assert len({tuple(other) for other in others}) == len(others)


def test_without_a_seed_every_sampler_draws_anew() -> None:
    assert tokens(make(temperature=2.0)) != tokens(make(temperature=2.0))


def test_greedy_takes_the_most_likely_token_and_the_lowest_id_at_par() -> None:
    assert set(tokens(make())) == {int(P.argmax())}
    assert make().choose(np.array([0, 2, 1, 2, *[0] * 8], np.float32)) == 1


def test_greedy_with_penalties_takes_the_most_likely_of_what_they_leave() -> None:
    ranked = [int(token) for token in np.argsort(-LOGITS)]
    assert tokens(make(prompt=(ranked[0], ranked[2]), no_repeat_ngram_size=1), 9) == [ranked[1], *ranked[3:11]]
    assert tokens(make(logit_bias={ranked[0]: -np.inf}), 3) == [ranked[1]] * 3


def test_the_repetition_penalty_counts_the_prompt_and_the_presence_penalty_does_not() -> None:
    logits = np.array([1.2, 1, *[-9] * 10], np.float32)
    assert tokens(make(prompt=(0,), repetition_penalty=1.5), 2, logits) == [1, 0]
    assert tokens(make(prompt=(0,), presence_penalty=0.5), 3, logits) == [0, 1, 0]
    assert tokens(make(prompt=(0,), frequency_penalty=0.5), 5, logits) == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("options", [{"min_new_tokens": 4}, {"min_length": 6}])
@pytest.mark.parametrize("best", [END, 0, 9])
def test_a_ban_of_ends_is_lifted_at_the_minimum_and_leaves_other_choices_as_they_are(
    best: int, options: dict[str, Any]
) -> None:
    logits = LOGITS.copy()
    logits[best] = 5
    banned = logits.astype(np.float64)
    banned[END] = -np.inf
    expected = [int(banned.argmax())] * 4 + [best] * 3
    assert tokens(make(**options), 7, logits) == expected
    sampler = make(**options)
    found = [sampler.choose_best(lambda count: (np.array([best]), logits[[best]])) for _ in range(3)]
    assert found == [None if best == END else best] * 3


def test_an_end_token_beyond_the_vocabulary_needs_no_ban() -> None:
    sampler = Sampler(SamplingOptions(min_new_tokens=1), {END, VOCABULARY, -1}, VOCABULARY, [0])
    logits = np.zeros(VOCABULARY, np.float32)
    logits[[END, -1]] = 9, 8
    assert sampler.choose(logits) == VOCABULARY - 1


def test_a_long_text_is_remembered_whole() -> None:
    sampler = make(no_repeat_ngram_size=3)
    chosen = [1, 2, *tokens(sampler, 200)]
    assert sampler.step == 200
    triples = list(zip(chosen, chosen[1:], chosen[2:], strict=False))
    assert len(set(triples)) == len(triples)


def test_forks_that_choose_in_turn_keep_histories_of_their_own() -> None:
    options = {"temperature": 1.5, "seed": 4, "no_repeat_ngram_size": 1}
    first = make(**options)
    samplers = [first, first.fork(1)]
    turns = [[sampler.choose(LOGITS) for sampler in samplers] for _ in range(8)]
    assert [list(chosen) for chosen in zip(*turns, strict=True)] == [
        tokens(make(row=row, **options), 8) for row in (0, 1)
    ]


def test_a_fork_keeps_the_history_so_far() -> None:
    first = make(no_repeat_ngram_size=1)
    chosen = tokens(first, 4)
    fork = first.fork(1)
    assert fork.step == 4
    rest = tokens(fork, 6)
    assert not {1, 2, *chosen} & set(rest)
    assert tokens(first, 6) == rest


def test_forks_without_a_seed_share_the_one_that_the_first_got() -> None:
    first = make(temperature=2.0)
    assert tokens(first.fork(3)) == tokens(first.fork(3)) != tokens(first.fork(4))
    assert tokens(first.fork(0)) == tokens(first)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_p": 0.5, "seed": 1}, {"repetition_penalty": 2.0, "logit_bias": {1: 1.0}}]
)
def test_the_logits_stay_as_they_are(options: dict[str, Any]) -> None:
    logits = LOGITS.copy()
    tokens(make(**options), 5, logits)
    np.testing.assert_array_equal(logits, LOGITS)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}, {"presence_penalty": 1.0}])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({7: np.nan, 9: np.nan}, "NaN at token 7"),
        ({9: np.inf}, r"\+inf at token 9"),
        ({5: np.inf, 9: np.nan}, "NaN at token 9"),
        ({7: np.nan, 0: -np.inf}, "NaN at token 7"),
        (dict.fromkeys(range(VOCABULARY), -np.inf), "every one is -inf"),
    ],
)
def test_logits_that_are_not_finite_stop_with_the_step(
    options: dict[str, Any], change: dict[int, float], what: str
) -> None:
    wrong = LOGITS.copy()
    wrong[list(change)] = list(change.values())
    sampler = make(**options)
    for step in range(3):
        with pytest.raises(BundleError, match=rf"^the logits of step {step} are not finite \({what}\): verify"):
            sampler.choose(wrong)
        assert sampler.step == step
        sampler.choose(LOGITS)
    with pytest.raises(BundleError, match=r"^the logits of step 41 "):
        check_finite(wrong, 41)


def test_masked_logits_are_finite_enough() -> None:
    masked = np.full(VOCABULARY, -np.inf, np.float32)
    masked[6] = -3
    assert check_finite(masked, 0) == 6
    assert tokens(make(temperature=1.0, top_k=3, top_p=0.9, min_p=0.1, typical_p=0.9), 3, masked) == [6] * 3
