"""Beam search: what a plain search over whole sequences finds, with caches that are copied no more than needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_bundle import MAX_CONTEXT, VOCABULARY, write_bundle

from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation.beam_results import adjustment
from satchel.runtime.generation.beam_search import BeamSearch, Hypothesis, highest_of
from satchel.runtime.generation.beam_settings import BeamSettings
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.prefix_cache import PrefixCache

PROMPT = (5, 80, 199, 12)
NEW_TOKENS = 12
MIB = 1 << 20

Found = list[tuple[tuple[int, ...], float, str]]
Adjust = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Reference:
    """Beam search with lists, full sorts, and a prefill of the whole sequence for every step of every beam."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.known: dict[tuple[int, ...], np.ndarray] = {}

    def log_probabilities(self, ids: tuple[int, ...]) -> np.ndarray:
        if ids not in self.known:
            logits = self.engine.prefill(self.engine.new_state(len(ids)), list(ids))
            self.known[ids] = logits - np.logaddexp.reduce(logits.astype(np.float64))
        return self.known[ids]

    def search(self, settings: BeamSettings, adjust: Adjust | None = None, prompt: tuple[int, ...] = PROMPT) -> Found:
        beams, power = settings.beams, settings.length_penalty
        running, ended = [((), 0.0)], list[tuple[float, tuple[int, ...], str]]()
        for length in range(1, settings.max_new_tokens + 1):
            candidates = []
            for tokens, total in running:
                scores = self.log_probabilities(prompt + tokens)
                if adjust:
                    scores = adjust(scores.copy(), np.array(prompt + tokens))
                candidates += [(total + scores[t], (*tokens, t)) for t in range(VOCABULARY) if scores[t] > -np.inf]
            candidates.sort(reverse=True)
            for total, tokens in candidates[:beams]:
                if tokens[-1] in settings.end_tokens:
                    ended.append((total / length**power, tokens[:-1], "stop"))
                elif length == settings.max_new_tokens:
                    ended.append((total / length**power, tokens, "length"))
            ended = sorted(ended, reverse=True)[:beams]
            running = [(tokens, total) for total, tokens in candidates if tokens[-1] not in settings.end_tokens][:beams]
            if len(ended) == beams:
                far = settings.max_new_tokens if settings.early_stopping == "never" and power > 0 else length
                if settings.early_stopping is True or running[0][1] / far**power <= ended[-1][0]:
                    break
        return [(tokens, score, reason) for score, tokens, reason in ended]


@pytest.fixture(scope="module")
def reference(engine: Engine) -> Reference:
    return Reference(engine)


def search(engine: Engine, settings: BeamSettings, **options: Any) -> BeamSearch:
    store = options.pop("store", None) or PrefixCache(engine.bundle.manifest.kv_cache, 0)
    return BeamSearch(engine, np.array(options.pop("prompt", PROMPT), np.int64), settings, store, **options)


def assert_same(found: list[Hypothesis], expected: Found) -> None:
    assert [(each.token_ids, each.finish_reason) for each in found] == [(ids, why) for ids, _, why in expected]
    np.testing.assert_allclose([each.score for each in found], [score for _, score, _ in expected], rtol=1e-5)


@pytest.fixture(scope="module")
def ends(reference: Reference) -> tuple[int, ...]:
    """Two tokens that beams without end tokens come to in the middle."""
    best, second, *_ = reference.search(BeamSettings(5, NEW_TOKENS))
    found = (best[0][4], second[0][7])
    assert len(set(found)) == 2
    return found


MANY = tuple(range(0, VOCABULARY, 3))
"""End tokens of which some are among the likeliest at every step."""


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_it_finds_what_a_plain_search_finds(
    engine: Engine, reference: Reference, ends: Collection[int], beams: int, length_penalty: float, early_stopping: Any
) -> None:
    for end_tokens in ((), ends[:1], ends, MANY):
        settings = BeamSettings(beams, NEW_TOKENS, end_tokens, length_penalty, early_stopping)
        expected = reference.search(settings)
        assert_same(search(engine, settings).run(), expected)
        assert len(expected) == beams
        if length_penalty < 1:  # beyond, texts that go on may be better than all that have ended
            assert any(reason == "stop" for *_, reason in expected) == bool(end_tokens)


def test_as_many_beams_as_tokens_find_the_best_of_all_sequences(engine: Engine, reference: Reference) -> None:
    first = reference.log_probabilities(PROMPT)
    end = int(np.argsort(first)[-3])
    totals = np.array([first[t] + reference.log_probabilities((*PROMPT, t)) for t in range(VOCABULARY)]) / 2
    everything = {(t, u): totals[t, u] for t in range(VOCABULARY) if t != end for u in range(VOCABULARY) if u != end}
    everything |= {(t,): totals[t, end] for t in range(VOCABULARY) if t != end} | {(): first[end]}
    best = sorted(everything, key=lambda tokens: -everything[tokens])[:20]
    found = search(engine, BeamSettings(VOCABULARY, 2, (end,))).run()[:20]
    assert [each.token_ids for each in found] == best
    np.testing.assert_allclose([each.score for each in found], [everything[tokens] for tokens in best], rtol=1e-5)


def test_rows_that_run_one_after_the_other_find_the_same(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BeamSettings(4, NEW_TOKENS)
    expected = search(engine, settings).run()
    monkeypatch.setattr(Engine, "batch_invariant", False)
    found = search(engine, settings).run()
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    np.testing.assert_allclose([each.score for each in found], [each.score for each in expected], rtol=1e-5)


def test_caches_are_copied_from_where_they_differ(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copy = Batch.copy

    def record(rows: Batch, source: int, target: int, start: int = 0) -> None:
        lengths = {rows.states[row].cache.length for row in (source, target)}
        layers = zip(*(rows.states[row].cache.past.values() for row in (source, target)), strict=True)
        same = all(np.array_equal(left[:, :, :start], right[:, :, :start]) for left, right in layers)
        copies.append((start, max(lengths), same))
        copy(rows, source, target, start)

    monkeypatch.setattr(Batch, "copy", record)
    search(engine, BeamSettings(5, 20)).run()
    assert [start for start, *_ in copies[:4]] == [0] * 4
    assert len(copies) > 10
    assert all(len(PROMPT) <= start < length for start, length, _ in copies[4:])
    assert all(same for *_, same in copies)


def test_beams_without_a_way_on_let_their_rows_go_and_come_back(engine: Engine, reference: Reference) -> None:
    def adjust(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
        scores = scores.copy()
        if len(ids) == len(PROMPT) + 2:  # children for the beams of even tokens alone, one each
            keep = scores.argmax() if ids[-1] % 2 == 0 else []
            scores[np.setdiff1d(np.arange(VOCABULARY), keep)] = -np.inf
        return scores

    settings = BeamSettings(5, 8)
    second = [tokens[-1] % 2 for tokens, *_ in reference.search(BeamSettings(5, 2))]
    assert 0 < sum(second) < 5
    expected = reference.search(settings, adjust)
    assert_same(search(engine, settings, adjust=adjust).run(), expected)


def test_fewer_sequences_than_beams_are_all_that_there_is(engine: Engine, reference: Reference) -> None:
    def adjust(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return np.where(np.isin(np.arange(VOCABULARY), (7, 8)), scores, -np.inf)

    settings = BeamSettings(5, 2, (8,))
    found = search(engine, settings, adjust=adjust).run()
    assert_same(found, reference.search(settings, adjust))
    assert sorted(each.token_ids for each in found) == [(), (7,), (7, 7)]


def test_penalties_change_log_probabilities(engine: Engine, reference: Reference) -> None:
    end = reference.search(BeamSettings(3, 6))[0][0][2]
    options = GenerationOptions(repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=5, frequency_penalty=0.5)
    adjust = adjustment(options, len(PROMPT), (end, VOCABULARY + 1), VOCABULARY)

    def by_hand(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
        tokens = ids.tolist()
        for token in set(tokens):
            scores[token] *= 1.4  # a log-probability is never above 0
        for token in tokens[len(PROMPT) :]:
            scores[token] -= 0.5
        scores[[after for before, after in itertools.pairwise(tokens) if before == tokens[-1]]] = -np.inf
        if len(tokens) < len(PROMPT) + 5:
            scores[end] = -np.inf
        return scores

    settings = BeamSettings(3, NEW_TOKENS, (end,))
    expected = reference.search(settings, by_hand)
    assert expected != reference.search(settings)
    assert all(len(tokens) >= 5 for tokens, *_ in expected)
    assert_same(search(engine, settings, adjust=adjust).run(), expected)
    assert adjustment(GenerationOptions(), 4, (end,), VOCABULARY) is None


def test_logits_that_are_not_finite_name_the_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Batch.decode

    def spoilt(rows: Batch, tokens: list[int]) -> None:
        decode(rows, tokens)
        if rows.states[0].cache.length == len(PROMPT) + 3:
            rows.logits[1, 9] = np.nan

    monkeypatch.setattr(Batch, "decode", spoilt)
    with pytest.raises(BundleError, match=r"logits of step 3 are not finite \(NaN at token 9\)"):
        search(engine, BeamSettings(3, 6)).run()


def test_a_search_prefills_what_is_new_and_keeps_the_best(engine: Engine) -> None:
    store = PrefixCache(engine.bundle.manifest.kv_cache, MIB)
    first = search(engine, BeamSettings(3, 6), store=store)
    best = first.run()[0]
    assert (first.reused_tokens, first.timing.decode_steps) == (0, 5)
    ids = np.array([*PROMPT, *best.token_ids])
    kept, cache = store.longest(ids)
    assert len(PROMPT) < kept < len(ids)
    fresh = engine.new_state(len(ids))
    engine.prefill(fresh, ids)
    for name, buffer in fresh.cache.past.items():
        np.testing.assert_allclose(cache.past[name][:, :, :kept], buffer[:, :, :kept], rtol=1e-4, atol=1e-4)
    again = search(engine, BeamSettings(3, 6), store=store)
    assert again.run()[0].token_ids == best.token_ids
    assert again.reused_tokens == len(PROMPT) - 2


def test_a_time_limit_ends_texts_where_they_are(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = search(engine, BeamSettings(3, 4)).run()
    clock = iter(range(100))
    monkeypatch.setattr("satchel.runtime.generation.beam_search.time.monotonic", lambda: float(next(clock)))
    # Asked at the start, after the only chunk, before the first step, and in each.
    found = search(engine, BeamSettings(3, 40, time_limit=6)).run()
    assert [each.finish_reason for each in found] == ["time"] * 3
    assert [each.token_ids for each in found] == [each.token_ids for each in unlimited]
    clock = iter(range(100))
    assert search(engine, BeamSettings(3, 40, time_limit=1)).run() == [Hypothesis((), 0.0, "time")]


def test_a_generator_gives_texts_and_scores(generator: Generator) -> None:
    prompt = "the cat sat"
    found = generator.beam_search(prompt, 3, max_new_tokens=9)
    ids = generator.encode(prompt).tolist()
    assert [each.finish_reason for each in found] == ["length"] * 3
    assert sorted((each.score for each in found), reverse=True) == [each.score for each in found]
    for each in found:
        assert prompt + each.text == generator.tokenizer.decode([*ids, *each.token_ids])
        logits = generator.engine.score([*ids, *each.token_ids])[len(ids) - 1 : -1].astype(np.float64)
        chosen = logits[range(9), each.token_ids] - np.logaddexp.reduce(logits, axis=1)
        assert math.isclose(each.score, chosen.mean(), rel_tol=1e-5)
        assert (each.prompt_tokens, each.new_tokens, each.decode_steps) == (len(ids), 9, 8)
    assert generator.generate(prompt, 9).score is None


def test_one_beam_is_greedy(tmp_path: Path, generator: Generator) -> None:
    tokens = generator.generate(PROMPT, 20).token_ids
    assert [each.token_ids for each in generator.beam_search(PROMPT, 1, max_new_tokens=20)] == [tokens]
    end = next(token for place, token in enumerate(tokens) if place > 4 and token not in tokens[:place])
    ending = Generator.open(write_bundle(tmp_path / "ending", eos_token_ids=(end,)), threads=1)
    found = ending.beam_search(PROMPT, 1, max_new_tokens=20, early_stopping="never", length_penalty=5.0)
    assert [(each.token_ids, each.finish_reason) for each in found] == [(tokens[: tokens.index(end)], "stop")]


def test_texts_end_where_the_context_does(generator: Generator) -> None:
    found = generator.beam_search([5] * (MAX_CONTEXT - 2), 2, max_new_tokens=50)
    assert [(each.new_tokens, each.finish_reason) for each in found] == [(3, "length")] * 2


def test_no_new_tokens_run_nothing(generator: Generator) -> None:
    (found,) = generator.beam_search(PROMPT, 4, max_new_tokens=0)
    assert (found.text, found.token_ids, found.finish_reason, found.score) == ("", (), "length", 0.0)
    assert found.prefill_seconds == found.decode_steps == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "--beams 0: must be a whole number from 1 to 256"),
        ({"beams": 257}, "--beams 257: must be"),
        ({"beams": 2.0}, "--beams 2.0: must be"),
        ({"length_penalty": math.nan}, "--length-penalty nan: must be a number from -10 to 10"),
        ({"length_penalty": math.inf}, "--length-penalty inf: must be"),
        ({"length_penalty": "1"}, "--length-penalty 1: must be"),
        ({"early_stopping": "always"}, "--early-stopping always: must be true, false or never"),
        ({"early_stopping": 1}, "--early-stopping 1: must be"),
        ({"temperature": 0.5}, "--temperature 0.5: cannot be combined with --beams"),
        ({"max_repeats": 8}, "--max-repeats 8: cannot be combined with --beams"),
        ({"max_thinking_tokens": 8}, "--max-thinking-tokens 8: cannot be combined with --beams"),
        ({"top_k": 5}, "--top-k 5: cannot"),
        ({"seed": 0}, "--seed 0: cannot"),
        ({"stop": ["\n"]}, r"--stop '\n': cannot"),
        ({"logprobs": 0}, "--logprobs 0: cannot"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "--min-new-tokens 9: is more than --max-new-tokens 8"),
        ({"logit_bias": {VOCABULARY: 1.0}}, f"--logit-bias {VOCABULARY}=1.0: outside the vocabulary"),
    ],
)
def test_what_does_not_go_with_beams_is_refused(generator: Generator, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError) as error:
        generator.beam_search(PROMPT, **{"beams": 2, **options})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("count", [1, 7, 40, 5000])
def test_the_highest_are_those_of_a_full_sort(count: int) -> None:
    rng = np.random.default_rng(count)
    for values in (rng.normal(size=4321), rng.integers(0, 9, 4321).astype(float), np.zeros(999)):
        values[rng.random(len(values)) < 0.3] = -np.inf
        order = [i for i in np.argsort(-values, kind="stable") if values[i] > -np.inf]
        assert highest_of(values, count).tolist() == order[:count]
    assert highest_of(np.full(500, -np.inf), count).tolist() == []
