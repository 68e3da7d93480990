"""Speculation changes the number of runs, and nothing of the text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.kernels import needs_kernels
from support.tiny_bundle import write_bundle
from support.tiny_native_bundle import write_native_bundle

from satchel.runtime.errors import BundleError
from satchel.runtime.execution.cpu import CpuEngine, CpuState
from satchel.runtime.execution.state import Ids, Logits, State
from satchel.runtime.generation import drafts
from satchel.runtime.generation.drafts import LONGEST_PAUSE, Drafter, NgramPool
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.optimize import specialize
from satchel.runtime.ort.open_bundle import open_bundle

PROMPT = np.random.default_rng(3).integers(3, 300, 20)
# Few tokens are left, so that the text repeats.
FEW = {token: -np.inf for token in range(400) if token % 57}
CASES: list[dict[str, object]] = [
    {"logit_bias": FEW},
    {"logit_bias": FEW, "temperature": 1.5, "seed": 4},
    {"logit_bias": FEW, "temperature": 0.8, "seed": 5, "frequency_penalty": 0.5, "logprobs": 1},
    {"logit_bias": FEW, "stop": ("zz", "qq"), "max_repeats": 40},
    {},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "roomy", max_context=300)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each run ahead, which is possible on the tiny bundle, if only in single steps."""
    counts: list[int] = []

    def decode_ahead(state: CpuState, tokens: Ids) -> Logits:
        counts.append(len(tokens))
        return State.decode_ahead(state, tokens)

    monkeypatch.setattr(CpuEngine, "may_run_ahead", lambda engine, state: True)
    monkeypatch.setattr(CpuState, "decode_ahead", decode_ahead)
    return counts


def essence(generator: Generator, new: int, options: dict[str, object]) -> tuple[object, ...]:
    result = generator.generate(PROMPT, new, **options)
    probabilities = [entry.logprob for entry in result.logprobs or ()]
    return result.token_ids, result.text, result.finish_reason, result.decode_steps, probabilities


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_text_is_the_same(folder: Path, ahead: list[int], options: dict[str, object]) -> None:
    generator = Generator.open(folder, threads=1, prefix_cache_mib=0)
    found = [essence(generator, 100, options) for _ in range(2)]  # the second time it is all known
    assert set(generator.engine.runs_ahead.values()) == {True}
    assert max(ahead) == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuEngine, "may_run_ahead", lambda engine, state: False)
        count = len(ahead)
        assert found == [essence(generator, 100, options)] * 2
        assert len(ahead) == count


@pytest.mark.parametrize("wrong", ["logits", "error"])
def test_kernels_that_give_something_else_are_found_out_and_not_used(
    folder: Path, ahead: list[int], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    generator = Generator.open(folder, threads=1, prefix_cache_mib=0)
    run = CpuState.decode_ahead

    def differing(state: CpuState, tokens: Ids) -> Logits:
        if wrong == "error":
            run(state, tokens[:1])
            raise BundleError("several tokens of one sequence")
        found = run(state, tokens)
        return np.nextafter(found, np.inf)

    monkeypatch.setattr(CpuState, "decode_ahead", differing)
    found = [essence(generator, 100, CASES[0]) for _ in range(2)]
    tried = set(generator.engine.runs_ahead.values())
    assert tried == {False}
    assert len(ahead) == len(generator.engine.runs_ahead)
    monkeypatch.setattr(CpuEngine, "may_run_ahead", lambda engine, state: False)
    assert found == [essence(generator, 100, CASES[0])] * 2


def test_the_prefix_cache_has_what_was_chosen(folder: Path, ahead: list[int]) -> None:
    generator = Generator.open(folder, threads=1)
    first = generator.generate(PROMPT, 60, logit_bias=FEW, seed=1, temperature=1.2)
    goes_on = [*PROMPT, *first.token_ids, 9, 8]
    assert ahead
    result = generator.generate(goes_on, 5)
    assert result.reused_tokens == len(goes_on) - 3
    other = Generator.open(folder, threads=1, prefix_cache_mib=0)
    assert result.token_ids == other.generate(goes_on, 5).token_ids


def test_a_request_that_runs_alone_speculates_and_several_do_not(folder: Path, ahead: list[int]) -> None:
    generator = Generator.open(folder, threads=1, prefix_cache_mib=0)
    options = GenerationOptions(max_new_tokens=100, logit_bias=FEW)
    scheduler = generator.scheduler(rows=2)
    for _ in range(2):
        scheduler.submit(Request(PROMPT, options))
    several = list(scheduler.run())
    assert ahead == []
    scheduler.submit(Request(PROMPT, options))
    alone = list(scheduler.run())
    assert max(ahead) == 8
    assert len(alone) < 80
    assert [token for event in alone for token in event.token_ids] == list(alone[-1].outcome.token_ids)
    assert {event.outcome.token_ids for event in (*several, *alone) if event.outcome} == {alone[-1].outcome.token_ids}


def raising_at(place: int) -> Callable[[str], object]:
    seen: list[str] = []

    def callback(piece: str) -> None:
        seen.append(piece)
        if len(seen) == place:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("place", range(20, 30))
def test_an_interrupt_keeps_nothing_wrong(folder: Path, ahead: list[int], place: int) -> None:
    generator = Generator.open(folder, threads=1)
    options = {"logit_bias": FEW, "temperature": 1.5, "seed": 4}
    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPT, 100, callback=raising_at(place), **options)
    assert ahead
    assert generator.prefix_cache.positions > len(PROMPT)
    found = generator.generate(PROMPT, 100, **options)
    other = Generator.open(folder, threads=1, prefix_cache_mib=0)
    assert found.token_ids == other.generate(PROMPT, 100, **options).token_ids


def test_drafts_are_what_followed_the_last_tokens() -> None:
    pool = NgramPool()
    drafter = Drafter(pool)
    prompt = np.array([1, 2, 3, 4, 5, 6, 7, 8, 1, 2])
    assert drafter.draft(prompt, [9], 10) == []
    assert drafter.draft(prompt, [9, 1, 2, 3], 10) == [4]
    drafter.learn(1, 1)
    assert drafter.draft(prompt, [9, 1, 2, 3, 4], 10) == [5, 6, 7]
    drafter.learn(3, 3)
    assert drafter.draft(prompt, [9, 1, 2, 3, 4, 5], 10) == [6, 7, 8, 1, 2, 9, 1]
    assert drafter.draft(prompt, [9, 1, 2, 3, 4, 5], 6) == [6, 7, 8]
    assert drafter.draft(prompt, [9, 1, 2, 3, 4, 5], 2) == [6]
    assert drafter.draft(prompt, [9, 1, 2, 3, 4, 5], 0) == []
    assert Drafter(pool).draft(np.array([50, 4, 5, 6]), [], 10) == [7]  # from another text


def test_wrong_drafts_make_a_pause_that_grows() -> None:
    pauses = []
    drafter = Drafter(NgramPool())
    prompt = np.array([1, 2, 3, 4, 1, 2, 3])
    for _ in range(8):
        assert drafter.draft(prompt, [], 5)
        drafter.learn(1, 0)
        pauses.append(0)
        while not drafter.draft(prompt, [], 5):
            pauses[-1] += 1
    assert pauses == [2, 4, 8, 16, 32, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_the_pool_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "MAX_NGRAMS", 10)
    pool = NgramPool()
    for start in range(0, 60, 6):
        pool.add(list(range(start, start + 6)), 0)
    assert pool.after([0, 1, 2], 1) == []
    assert pool.after([54, 55, 56], 2) == [57, 58]


@needs_kernels
def test_on_satchels_own_kernels_a_run_ahead_gives_the_same_bits(tmp_path: Path) -> None:
    folder = write_native_bundle(tmp_path / "native")
    specialize.specialize(open_bundle(folder), kernels="satchel", threads=1)
    engine = Generator.open(folder, threads=1, specialize=False).engine
    one, other = (engine.new_state(50) for _ in range(2))
    assert engine.may_run_ahead(one)
    for state in (one, other):
        engine.prefill(state, PROMPT)
    found, expected = one.decode_ahead(PROMPT[:8]), State.decode_ahead(other, PROMPT[:8])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert one.cache.length == other.cache.length == len(PROMPT) + 8
    for state in (one, other):
        state.cache.shorten(len(PROMPT) + 3)
        state.decode(7)
    np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-4 * np.abs(other.logits).max())
