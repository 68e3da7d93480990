"""Prompts that run together, and samples of one prompt: each gives what it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.tiny_bundle import MAX_CONTEXT, VOCABULARY, write_bundle

from satchel.runtime.errors import BundleError, PromptError, SatchelError
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.cpu import CpuState
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation import sequence as continuation
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation

LENGTHS = (5, 1, 17, 9, 30, 2, 11)
PREFIX = list(range(100, 120))


def prompts_of(*lengths: int) -> list[list[int]]:
    """Prompts that have nothing in common: each begins with another token."""
    rng = np.random.default_rng(4)
    return [[30 + i, *rng.integers(3, 300, length - 1).tolist()] for i, length in enumerate(lengths)]


PROMPTS = prompts_of(*LENGTHS)


@pytest.fixture
def fresh(tiny: Path) -> Generator:
    """A generator that keeps nothing."""
    return Generator.open(tiny, threads=1, prefix_cache_mib=0)


def alone(generator: Generator, requests: list[Request]) -> list[Generation]:
    return [
        generator.generate(r.prompt, **{name: getattr(r.options, name) for name in r.options.__dataclass_fields__})
        for r in requests
    ]


def together(generator: Generator, requests: list[Request], rows: int) -> list[Generation | SatchelError]:
    found = dict(generator.run_requests(requests, rows=rows))
    return [found[index] for index in range(len(requests))]


def essence(result: Generation) -> tuple[object, ...]:
    return result.text, result.token_ids, result.finish_reason, result.prompt_tokens, result.decode_steps


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of `State.prefill` fed, but for the trial whether rows agree."""
    counts: list[int] = []
    monkeypatch.setattr(Engine, "invariant_with", lambda *_: True)
    prefill = CpuState.prefill

    def counting(self: CpuState, ids: np.ndarray) -> None:
        counts.append(len(ids))
        prefill(self, ids)

    monkeypatch.setattr(CpuState, "prefill", counting)
    return counts


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 2.0, "seed": 4, "top_k": 9, "repetition_penalty": 1.4}],
)
def test_each_of_a_batch_gives_what_it_gives_alone(fresh: Generator, rows: int, options: dict[str, float]) -> None:
    found = fresh.generate_batch(PROMPTS, rows=rows, max_new_tokens=12, **options)
    expected = [fresh.generate(prompt, 12, **options) for prompt in PROMPTS]
    assert [essence(result) for result in found] == [essence(result) for result in expected]
    assert len({result.token_ids for result in found}) == len(PROMPTS)


def test_each_may_have_options_of_its_own_and_end_when_it_likes(tmp_path: Path, fresh: Generator) -> None:
    first, later = fresh.generate(PROMPTS[1], 1).token_ids[0], fresh.generate(PROMPTS[2], 8).token_ids[7]
    ending = Generator.open(
        write_bundle(tmp_path / "ending", eos_token_ids=(first, later)), threads=1, prefix_cache_mib=0
    )
    each = [
        {"max_new_tokens": 3},
        {},  # its first token is an end token
        {},
        {"max_new_tokens": 0},
        {"temperature": 2.0, "seed": 8, "logprobs": 2},
        {"stop": ("e", "a", "i", "o")},
        {"min_new_tokens": 9, "max_new_tokens": 10},
    ]
    requests = [Request(prompt, GenerationOptions(**own)) for prompt, own in zip(PROMPTS, each, strict=True)]
    found, expected = together(ending, requests, 3), alone(ending, requests)
    assert [essence(result) for result in found] == [essence(result) for result in expected]
    assert [(result.finish_reason, result.new_tokens) for result in found[:4]] == [
        ("length", 3), ("stop", 0), ("stop", 7), ("length", 0),
    ]  # fmt: skip
    assert len(found[4].logprobs) == found[4].new_tokens
    for entry, same in zip(found[4].logprobs, expected[4].logprobs, strict=True):
        assert entry.token == same.token
        assert entry.logprob == pytest.approx(same.logprob, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_all_may_end_at_their_first_token(tmp_path: Path, fresh: Generator, rows: int) -> None:
    ends = tuple({fresh.generate(prompt, 1).token_ids[0] for prompt in PROMPTS})
    ending = Generator.open(write_bundle(tmp_path / "ending", eos_token_ids=ends), threads=1)
    found = ending.generate_batch(PROMPTS, rows=rows, max_new_tokens=5)
    assert [(result.finish_reason, result.new_tokens, result.decode_steps) for result in found] == [("stop", 0, 0)] * 7


def test_prompts_may_fill_the_context(fresh: Generator) -> None:
    prompts = prompts_of(MAX_CONTEXT, 3, MAX_CONTEXT - 1, MAX_CONTEXT)
    found = fresh.generate_batch(prompts, rows=3, max_new_tokens=100)
    assert [essence(result) for result in found] == [essence(fresh.generate(prompt, 100)) for prompt in prompts]
    assert [result.new_tokens for result in found] == [1, MAX_CONTEXT - 2, 2, 1]


def test_a_prompt_waits_until_a_row_is_free(fresh: Generator, prefilled: list[int]) -> None:
    requests = [Request(prompt, GenerationOptions(max_new_tokens=4)) for prompt in PROMPTS]
    running = fresh.run_requests(requests, rows=2)
    next(running)
    assert prefilled == [5, 1]
    running.close()


# Bans all but three tokens, none of which may come twice: there is none left for the fourth.
EXHAUSTED = GenerationOptions(
    no_repeat_ngram_size=1, logit_bias={token: -np.inf for token in range(VOCABULARY) if token not in (200, 201, 202)}
)


def test_one_that_fails_does_not_touch_the_others(fresh: Generator) -> None:
    wrong = [
        (Request([5] * (MAX_CONTEXT + 1)), "has 65 tokens but the context holds 64"),
        (Request(PROMPTS[0], EXHAUSTED), "no token is left"),
        (Request([VOCABULARY]), "token id 400 is outside the vocabulary"),
        (Request(PROMPTS[1], GenerationOptions(top_p=0.5)), "--top-p 0.5: has no effect at temperature 0"),
        (Request(PROMPTS[2], GenerationOptions(logit_bias=dict.fromkeys(range(VOCABULARY), -np.inf))), "no token is"),
    ]
    right = [Request(prompt, GenerationOptions(max_new_tokens=9)) for prompt in PROMPTS]
    requests = [request for pair in zip([request for request, _ in wrong], right, strict=False) for request in pair]
    expected = alone(fresh, right)
    for rows in (2, 3, 10):
        found = together(fresh, requests, rows)
        for outcome, (_, message) in zip(found[::2], wrong, strict=True):
            assert isinstance(outcome, PromptError)
            assert message in str(outcome)
        assert [essence(result) for result in found[1::2]] == [essence(result) for result in expected[: len(wrong)]]


def test_logits_that_are_not_finite_end_one_row(fresh: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(prompt, GenerationOptions(max_new_tokens=6)) for prompt in PROMPTS]
    expected = alone(fresh, requests)
    take = continuation.ActiveSequence.take_from

    def spoiled(self: continuation.ActiveSequence, state: State) -> str:
        if len(self.prompt) == LENGTHS[2] and len(self.token_ids) == 3:
            state.logits[11] = np.nan
        return take(self, state)

    monkeypatch.setattr(continuation.ActiveSequence, "take_from", spoiled)
    kept = Generator.open(fresh.engine.bundle.folder, threads=1)
    found = together(kept, requests, 4)
    assert isinstance(found[2], BundleError)
    assert "the logits of step 3 are not finite (NaN at token 11)" in str(found[2])
    del found[2], expected[2]
    assert [essence(result) for result in found] == [essence(result) for result in expected]
    assert kept.prefix_cache.longest(np.array(PROMPTS[2])) == (0, None)
    assert kept.prefix_cache.longest(np.array(PROMPTS[3]))[0] == LENGTHS[3]


@pytest.mark.parametrize("prefix_cache_mib", [0, 8])
def test_what_rows_beside_have_in_common_is_fed_once(
    tiny: Path, fresh: Generator, prefilled: list[int], prefix_cache_mib: int
) -> None:
    prompts = [[*PREFIX, 40 + i, 7 + i] for i in range(5)]
    expected = [fresh.generate(prompt, 8) for prompt in prompts]
    prefilled.clear()
    found = Generator.open(tiny, threads=1, prefix_cache_mib=prefix_cache_mib).generate_batch(
        prompts, rows=5, max_new_tokens=8
    )
    assert prefilled == [22, 2, 2, 2, 2]
    assert [result.reused_tokens for result in found] == [0, 20, 20, 20, 20]
    assert [essence(result) for result in found] == [essence(result) for result in expected]


def test_what_a_row_had_before_it_was_let_go_is_in_the_store(tiny: Path, fresh: Generator) -> None:
    prompts = [[*PREFIX, 40 + i, 7 + i] for i in range(5)]
    expected = [essence(fresh.generate(prompt, 8)) for prompt in prompts]
    generator = Generator.open(tiny, threads=1)
    for reused in ([0, 20, 20, 20, 20], [20, 20, 20, 20, 20]):  # the last two tokens of a prompt always run
        found = generator.generate_batch(prompts, rows=1, max_new_tokens=8)
        assert [result.reused_tokens for result in found] == reused
        assert [essence(result) for result in found] == expected
    goes_on = [*prompts[0], *generator.generate(prompts[0], 8).token_ids, 9]
    result = generator.generate(goes_on, 5)
    assert result.reused_tokens == len(goes_on) - 2
    assert result.token_ids == fresh.generate(goes_on, 5).token_ids


def test_samples_come_from_one_prefill_and_the_first_is_what_generate_gives(
    fresh: Generator, prefilled: list[int]
) -> None:
    sampling = {"max_new_tokens": 10, "temperature": 1.5, "seed": 6, "logprobs": 1}
    found = fresh.samples(PROMPTS[2], 4, **sampling)
    assert prefilled == [17]
    assert len({result.token_ids for result in found}) == 4
    single = fresh.generate(PROMPTS[2], **sampling)
    assert essence(found[0]) == essence(single)
    assert [result.reused_tokens for result in found] == [0, 17, 17, 17]
    assert all(len(result.logprobs) == 10 for result in found)
    assert [result.kv_bytes for result in found] == [single.kv_bytes] * 4
    assert [essence(result) for result in fresh.samples(PROMPTS[2], 2, **sampling)] == [*map(essence, found[:2])]


def test_samples_end_when_they_like(tmp_path: Path, fresh: Generator) -> None:
    sampling = {"max_new_tokens": 12, "temperature": 2.0, "seed": 2}
    plain = fresh.samples(PROMPTS[0], 4, **sampling)
    ends = (plain[0].token_ids[0], plain[1].token_ids[4], plain[2].token_ids[7])
    ending = Generator.open(write_bundle(tmp_path / "ending", eos_token_ids=ends), threads=1)
    found = ending.samples(PROMPTS[0], 4, **sampling)
    places = [next((i for i, token in enumerate(one.token_ids) if token in ends), 12) for one in plain]
    assert len(set(places)) > 2
    assert [result.token_ids for result in found] == [
        one.token_ids[:place] for one, place in zip(plain, places, strict=True)
    ]
    assert [result.finish_reason for result in found] == ["length" if place == 12 else "stop" for place in places]


def test_samples_of_no_tokens_run_nothing(fresh: Generator, prefilled: list[int]) -> None:
    found = fresh.samples(PROMPTS[0], 2, max_new_tokens=0, temperature=1.0)
    assert [(result.text, result.finish_reason) for result in found] == [("", "length")] * 2
    assert prefilled == []


@pytest.mark.parametrize("seconds", [3, 7])
def test_the_time_of_samples_begins_with_their_prompt(
    fresh: Generator, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """Of 5 seconds the prompt takes 3 or 7, and so does each step."""
    now = [0.0]
    monkeypatch.setattr(continuation, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for owner, name in ((CpuState, "prefill"), (Batch, "decode")):
        plain = getattr(owner, name)

        def slow(*all: object, plain: Callable[..., object] = plain) -> object:
            now[0] += seconds
            return plain(*all)

        monkeypatch.setattr(owner, name, slow)
    found = fresh.samples(PROMPTS[0], 3, max_new_tokens=9, temperature=1.0, seed=1, time_limit=5)
    tokens = 2 if seconds == 3 else 0
    assert [(result.finish_reason, result.new_tokens) for result in found] == [("time", tokens)] * 3


def test_wrong_samples_are_refused(fresh: Generator) -> None:
    for count, options, message in (
        (0, {"temperature": 1.0}, "--num-return-sequences 0: must be 1 or more"),
        (2, {}, "--num-return-sequences 2: greedy samples are all the same: set --temperature above 0"),
        (2, {"temperature": -1.0}, "--temperature -1.0: must be"),
        (2, {"temperature": 1.0, "stop": ("",)}, "--stop: must be"),
    ):
        with pytest.raises(PromptError, match=message):
            fresh.samples(PROMPTS[0], count, **options)
    assert fresh.samples(PROMPTS[0], 1, max_new_tokens=3)[0].token_ids == fresh.generate(PROMPTS[0], 3).token_ids


def test_a_sample_that_fails_later_raises_what_it_ran_into(fresh: Generator) -> None:
    options = {name: getattr(EXHAUSTED, name) for name in ("no_repeat_ngram_size", "logit_bias")}
    with pytest.raises(PromptError, match="no token is left"):
        fresh.samples(PROMPTS[0], 2, temperature=1.0, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 11}])
def test_the_same_seed_gives_the_same_text_on_any_number_of_threads(tiny: Path, options: dict[str, float]) -> None:
    one, two = (Generator.open(tiny, threads=threads, prefix_cache_mib=0) for threads in (1, 2))
    found, expected = (generator.generate_batch(PROMPTS, max_new_tokens=20, **options) for generator in (one, two))
    assert [essence(result) for result in found] == [essence(result) for result in expected]
    if options:
        samples = [[*map(essence, generator.samples(PROMPTS[0], 3, **options))] for generator in (one, two)]
        assert samples[0] == samples[1]
        other = one.generate(PROMPTS[0], 20, temperature=1.2, seed=12)
        assert essence(other) != essence(found[0])


def test_a_batch_with_something_wrong_raises_it(fresh: Generator) -> None:
    with pytest.raises(PromptError, match="the prompt has no tokens"):
        fresh.generate_batch([[5], []])
    with pytest.raises(PromptError, match="no token is left"):
        fresh.generate_batch([[5]], logit_bias=dict.fromkeys(range(VOCABULARY), -np.inf))
    with pytest.raises(PromptError, match="--batch 0: must be 1 or more"):
        fresh.generate_batch([[5]], rows=0)
    with pytest.raises(TypeError, match="beam"):
        fresh.generate_batch([[5]], beam=3)
    assert fresh.generate_batch([]) == []


def test_prompts_may_be_texts(fresh: Generator) -> None:
    texts = ["the cat", "satchel carries a model"]
    found = fresh.generate_batch(texts, max_new_tokens=7, stop="q")
    assert [essence(result) for result in found] == [essence(fresh.generate(text, 7, stop="q")) for text in texts]


def test_the_log_probabilities_of_a_prompt_are_those_of_the_score_graph(fresh: Generator) -> None:
    text = "the cat sat on the mat"
    ids = fresh.encode(text)
    logits = fresh.engine.score(ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    first, *found = fresh.prompt_logprobs(text, top_n=2)
    assert first is None
    for row, token, entry in zip(expected[:-1], ids[1:], found, strict=True):
        best = np.argsort(-row, kind="stable")[:2]
        assert (entry.token, [top for top, _ in entry.top]) == (token, best.tolist())
        np.testing.assert_allclose([entry.logprob, *(p for _, p in entry.top)], row[[token, *best]], atol=1e-9)
    assert fresh.prompt_logprobs([7]) == [None]


def test_the_log_probabilities_of_a_wrong_prompt_are_refused(tiny: Path, fresh: Generator) -> None:
    with pytest.raises(PromptError, match="the prompt has no tokens"):
        fresh.prompt_logprobs([])
    with pytest.raises(PromptError, match="has 11 tokens but the context holds 10"):
        Generator.open(tiny, threads=1, max_context=10).prompt_logprobs([5] * 11)
    with pytest.raises(PromptError, match="the -1 most likely tokens were asked for"):
        fresh.prompt_logprobs([5, 6], -1)


def test_rows_that_do_not_agree_run_in_turn_unless_asked_to_run_together(tmp_path: Path) -> None:
    mixed = Generator.open(write_bundle(tmp_path / "mixed", rows_mix=0.5), threads=1, prefix_cache_mib=0)
    expected = [mixed.generate(prompt, 12).token_ids for prompt in PROMPTS]
    found = mixed.generate_batch(PROMPTS, rows=4, max_new_tokens=12)
    assert [result.token_ids for result in found] == expected
    faster = mixed.generate_batch(PROMPTS, rows=4, max_new_tokens=12, force_batch=True)
    assert [result.token_ids for result in faster] != expected


def test_reused_tokens_are_a_multiple_of_what_the_manifest_says(tiny: Path) -> None:
    generator = Generator.open(tiny, threads=1)
    bundle = generator.engine.bundle
    generator.engine.bundle = replace(bundle, manifest=replace(bundle.manifest, token_multiple=2))
    generator.generate([*PREFIX, 7, 8, 9], 2)
    for length, reused in ((17, 16), (18, 18)):
        assert generator.generate([*PREFIX[:length], 30, 31, 32], 2).reused_tokens == reused
